"""What a whole answer over HTTP says: texts, tokens, composition, time."""

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence

from fastapi import Response
from pydantic import BaseModel

from lorafleet.engine.text import HALF
from serve.messages import Begun, Completed, Ended, Token
from serve.protocol.requests import ChatCompletionRequest, CompletionRequest
from serve.protocol.responses import (
    AnswerMessage,
    AppliedComposition,
    ChatChoice,
    ChatCompletionResponse,
    ChatLogprobs,
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    RoutedNeighbour,
    Timings,
    TokenLogprob,
    TopLogprob,
    Usage,
)


async def json_response(answer: Callable[[], BaseModel], large: bool) -> Response:
    """Assemble a whole answer and write it as JSON.

    Args:
        large: off the event loop, as with the alternatives to every token.
    """

    def body() -> str:
        return answer().model_dump_json()

    return Response(await asyncio.to_thread(body) if large else body(), media_type="application/json")


def completion_response(request: CompletionRequest, completed: Sequence[Completed], start: float) -> CompletionResponse:
    """The answer of /v1/completions to a request that came at `start`, a value of `time.perf_counter`."""
    several = len(completed) > 1
    answers = [(answer.begun, continuation) for answer in completed for continuation in answer.continuations]
    return CompletionResponse(
        id=new_id("cmpl"),
        created=int(time.time()),
        model=request.model,
        choices=[
            CompletionChoice(
                index=index,
                text=begun.echo + continuation.text,
                finish_reason=continuation.ended.finish_reason,
                logprobs=None if request.logprobs is None else completion_logprobs(continuation.tokens, request.logprobs),
                composition=applied(begun) if several else None,
            )
            for index, (begun, continuation) in enumerate(answers)
        ],
        usage=usage([_ends(answer) for answer in completed]),
        composition=applied(completed[0].begun),
        timings=timings([(answer.begun, _ends(answer)) for answer in completed], start),
    )


def chat_response(request: ChatCompletionRequest, completed: Completed, start: float) -> ChatCompletionResponse:
    """The answer of /v1/chat/completions to a request that came at `start`, a value of `time.perf_counter`."""
    return ChatCompletionResponse(
        id=new_id("chatcmpl"),
        created=int(time.time()),
        model=request.model,
        choices=[
            ChatChoice(
                index=index,
                message=AnswerMessage(content=continuation.text),
                finish_reason=continuation.ended.finish_reason,
                logprobs=chat_logprobs(continuation.tokens) if request.logprobs else None,
            )
            for index, continuation in enumerate(completed.continuations)
        ],
        usage=usage([_ends(completed)]),
        composition=applied(completed.begun),
        timings=timings([(completed.begun, _ends(completed))], start),
    )


def new_id(kind: str) -> str:
    """The id of an answer."""
    return f"{kind}-{uuid.uuid4().hex}"


def applied(begun: Begun) -> AppliedComposition:
    """What was composed, as an answer says it."""
    composition, weighed = begun.composition, begun.weighed
    rows = weighed.neighbours if weighed else None
    return AppliedComposition(
        method=composition.method,
        weights=dict(composition.weights),
        density=composition.density,
        weigher=weighed.weigher if weighed else None,
        neighbours=None
        if rows is None
        else [RoutedNeighbour(task=row.task, text=row.text, similarity=row.similarity) for row in rows],
    )


def usage(ends: Sequence[Sequence[Ended]]) -> Usage:
    """The tokens of all answers, given prompt by prompt."""
    prompt = sum(answers[0].prompt_tokens for answers in ends)
    completion = sum(ended.tokens for answers in ends for ended in answers)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def timings(answers: Sequence[tuple[Begun, Sequence[Ended]]], start: float) -> Timings:
    """Where the time went: of several prompts the longest of each."""
    weighed = [begun.weighed for begun, _ in answers if begun.weighed is not None]
    ends = [ended for _, ends in answers for ended in ends]
    return Timings(
        retrieval_ms=round(max((one.retrieval_ms for one in weighed), default=0.0), 3),
        weighing_ms=round(max((one.weighing_ms for one in weighed), default=0.0), 3),
        queue_ms=round(max(ended.queue_ms for ended in ends), 3),
        first_token_ms=round(max(ended.first_token_ms for ended in ends), 3),
        total_ms=milliseconds_since(start),
    )


def milliseconds_since(start: float) -> float:
    """The time since `start`, a value of `time.perf_counter`."""
    return round(1000 * (time.perf_counter() - start), 3)


def completion_logprobs(tokens: Sequence[Token], top: int) -> CompletionLogprobs:
    """The tokens of a completion, and `top` alternatives beside each."""
    return CompletionLogprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[token.log_probability for token in tokens],
        text_offset=[token.start for token in tokens],
        top_logprobs=[_alternatives(token) for token in tokens] if top else None,
    )


def chat_logprobs(tokens: Sequence[Token]) -> ChatLogprobs:
    """The tokens of a chat answer."""
    return ChatLogprobs(
        content=[
            TokenLogprob(
                token=token.text,
                logprob=token.log_probability or 0.0,
                bytes=utf8(token.text),
                top_logprobs=[TopLogprob(token=text, logprob=value, bytes=utf8(text)) for text, value in token.likeliest],
            )
            for token in tokens
        ]
    )


def utf8(text: str) -> list[int] | None:
    """A token's bytes; None for a part of a character, whose text does not tell them."""
    return None if HALF in text else list(text.encode())


def _alternatives(token: Token) -> dict[str, float] | None:
    if token.log_probability is None:
        return None
    return {**dict(reversed(token.likeliest)), token.text: token.log_probability}


def _ends(completed: Completed) -> list[Ended]:
    return [continuation.ended for continuation in completed.continuations]
