"""What the chunks of a streamed answer say."""

import time
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

from serve.answers import applied, chat_logprobs, completion_logprobs, new_id, timings, usage
from serve.messages import Begun, Ended, News
from serve.protocol.requests import ChatCompletionRequest, CompletionRequest
from serve.protocol.responses import ChatChunkChoice, ChatCompletionChunk, CompletionChunk, CompletionChunkChoice, Delta

Choice = TypeVar("Choice", CompletionChunkChoice, ChatChunkChoice)
Chunk = CompletionChunk | ChatCompletionChunk


class Wording(Protocol[Choice]):
    """How one of the two kinds of stream says things."""

    def opening(self, index: int, begun: Begun) -> Choice:
        """The first chunk's word on an answer: nothing of its text yet."""

    def news(self, index: int, news: News) -> Choice:
        """A piece of an answer, or its end."""

    def chunk(self, choices: Sequence[Choice], **told: Any) -> Chunk:
        """A chunk; `told` is what stands beside the choices."""


class CompletionWording:
    """The words of /v1/completions."""

    def __init__(self, request: CompletionRequest) -> None:
        self._request, self._several = request, len(request.prompts) > 1
        self._head = {"object": "text_completion", **_head("cmpl", request.model)}

    def opening(self, index: int, begun: Begun) -> CompletionChunkChoice:
        """The prompt where it is echoed, and its composition where there are several."""
        told = {"composition": applied(begun)} if self._several else {}
        return CompletionChunkChoice(index=index, text=begun.echo, finish_reason=None, logprobs=None, **told)

    def news(self, index: int, news: News) -> CompletionChunkChoice:
        """A piece of text, or the end."""
        top = self._request.logprobs
        return CompletionChunkChoice(
            index=index,
            text=news.text,
            finish_reason=news.ended.finish_reason if news.ended else None,
            logprobs=completion_logprobs(news.tokens, top) if top is not None and news.tokens else None,
        )

    def chunk(self, choices: Sequence[CompletionChunkChoice], **told: Any) -> CompletionChunk:
        """A chunk."""
        return CompletionChunk(**self._head, choices=list(choices), **told)


class ChatWording:
    """The words of /v1/chat/completions."""

    def __init__(self, request: ChatCompletionRequest) -> None:
        self._request = request
        self._head = {"object": "chat.completion.chunk", **_head("chatcmpl", request.model)}

    def opening(self, index: int, begun: Begun) -> ChatChunkChoice:
        """Who speaks."""
        return ChatChunkChoice(index=index, delta=Delta(role="assistant", content=""), finish_reason=None, logprobs=None)

    def news(self, index: int, news: News) -> ChatChunkChoice:
        """A piece of the message, or its end."""
        return ChatChunkChoice(
            index=index,
            delta=Delta() if news.ended else Delta(content=news.text),
            finish_reason=news.ended.finish_reason if news.ended else None,
            logprobs=chat_logprobs(news.tokens) if self._request.logprobs and news.tokens else None,
        )

    def chunk(self, choices: Sequence[ChatChunkChoice], **told: Any) -> ChatCompletionChunk:
        """A chunk."""
        return ChatCompletionChunk(**self._head, choices=list(choices), **told)


class Chunks(Generic[Choice]):
    """The chunks of one stream, in order; every choice of every prompt has an index of its own.

    Args:
        n: answers a prompt.
        usage_wanted: whether the stream ends with a chunk for the usage alone.
        start: when the request came, a value of `time.perf_counter`.
    """

    def __init__(self, wording: Wording[Choice], n: int, usage_wanted: bool, start: float) -> None:
        self._wording, self._n, self._usage_wanted, self._start = wording, n, usage_wanted, start
        # As OpenAI has it, the chunks before the last have a usage too where it is wanted, which is null.
        self._always: dict[str, Any] = {"usage": None} if usage_wanted else {}
        self._begun: Sequence[Begun] = ()
        self._ends: list[dict[int, Ended]] = []

    def openings(self, begun: Sequence[Begun]) -> list[Chunk]:
        """One chunk for each answer to come; the very first says what was composed for the first prompt."""
        self._begun, self._ends = begun, [{} for _ in begun]
        opened = [one for one in begun for _ in range(self._n)]
        first: dict[str, Any] = {"composition": applied(begun[0])}
        return [
            self._wording.chunk([self._wording.opening(index, one)], **self._always, **({} if index else first))
            for index, one in enumerate(opened)
        ]

    def news(self, prompt: int, batch: Sequence[News]) -> list[Chunk]:
        """The chunks for what is new of a prompt's answers; behind the last answer's end, what is to be said of all."""
        chunks = []
        for news in batch:
            told: dict[str, Any] = {}
            if news.ended is not None:
                self._ends[prompt][news.choice] = news.ended
                if self._complete and not self._usage_wanted:
                    told = {"timings": self._timings()}
            choice = self._wording.news(prompt * self._n + news.choice, news)
            chunks.append(self._wording.chunk([choice], **self._always, **told))
        if self._complete and self._usage_wanted:
            tokens = usage([list(ends.values()) for ends in self._ends])
            chunks.append(self._wording.chunk([], usage=tokens, timings=self._timings()))
        return chunks

    @property
    def _complete(self) -> bool:
        return all(len(ends) == self._n for ends in self._ends)

    def _timings(self) -> Any:
        ends = [list(ends.values()) for ends in self._ends]
        return timings(list(zip(self._begun, ends, strict=True)), self._start)


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": new_id(kind), "created": int(time.time()), "model": model}
