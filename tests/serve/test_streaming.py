"""Server-sent events: what a stream says, in which order, and how it ends."""

import asyncio
import json
import time

import pytest

from lorafleet.composition import Composition
from lorafleet.errors import EngineFull
from serve.chunks import ChatWording, Chunks, CompletionWording
from serve.deadline import Deadline
from serve.messages import Begun, Ended, News, Weighed
from serve.protocol.requests import ChatCompletionRequest, CompletionRequest
from serve.streaming import EventStream, Merged

WEIGHED = Weighed({"copa": 1.0}, {"copa": 0.7, "wnli": 0.3}, "nucleus", None, 3.0, 0.5)
BEGUN = Begun(Composition("cat", {"copa": 1.0}), WEIGHED)
ENDED = Ended("stop", 7, 2, 1.5, 20.0)


class Replica:
    """A stream of the generator whose items are known before; an exception is raised in its place."""

    def __init__(self, *items) -> None:
        self._items, self.cancelled = iter(items), False

    async def __anext__(self):
        await asyncio.sleep(0)
        match next(self._items, None):
            case None:
                raise StopAsyncIteration
            case Exception() as error:
                raise error
            case float() as seconds:
                await asyncio.sleep(seconds)
                return await self.__anext__()
            case item:
                return item

    def cancel(self) -> None:
        self.cancelled = True


def streamed(request, *replicas, seconds: float = 60) -> list:
    """The events of a request's stream, over ASGI."""
    wording = ChatWording(request) if isinstance(request, ChatCompletionRequest) else CompletionWording(request)
    chunks = Chunks(wording, request.n or 1, request.include_usage, time.perf_counter())
    sent = []

    async def send(message) -> None:
        sent.append(message)

    async def receive():
        await asyncio.sleep(600)

    async def stream() -> None:
        merged = Merged(replicas)
        begun = await merged.begun()
        await EventStream(merged, begun, chunks, Deadline(seconds))({"type": "http"}, receive, send)

    asyncio.run(stream())
    body = b"".join(message.get("body", b"") for message in sent).decode()
    assert body.endswith("\n\n")
    events = body.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [event.removeprefix("data: ") for event in events]


def test_prompts_and_choices_are_told_apart_by_index_and_what_is_said_of_all_comes_first_and_last():
    request = CompletionRequest(prompt=["one", "two"], n=2, stream=True)
    first = Replica(BEGUN, [News(0, "a"), News(1, "b\n\ndata: c")], [News(0, "", ended=ENDED), News(1, "", ended=ENDED)])
    second = Replica(BEGUN, 0.05, [News(1, "d")], [News(1, "", ended=ENDED)], [News(0, "e"), News(0, "", ended=ENDED)])
    *events, done = streamed(request, first, second)
    chunks = [json.loads(event) for event in events]

    assert done == "[DONE]"
    assert [chunk["choices"][0]["index"] for chunk in chunks[:4]] == [0, 1, 2, 3]
    assert all(chunk["choices"][0]["composition"]["weights"] == {"copa": 1.0} for chunk in chunks[:4])
    texts = {
        index: "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == index) for index in range(4)
    }
    assert texts == {0: "a", 1: "b\n\ndata: c", 2: "e", 3: "d"}
    assert [("composition" in chunk, "timings" in chunk) for chunk in chunks] == [
        (number == 0, number == len(chunks) - 1) for number in range(len(chunks))
    ]
    assert not any("usage" in chunk for chunk in chunks)
    assert chunks[-1]["timings"] | {"total_ms": 0} == {
        "retrieval_ms": 3.0,
        "weighing_ms": 0.5,
        "queue_ms": 1.5,
        "first_token_ms": 20.0,
        "total_ms": 0,
    }
    assert (first.cancelled, second.cancelled) == (False, False)


def test_the_usage_has_a_chunk_of_its_own_where_it_is_wanted():
    request = ChatCompletionRequest(
        messages=[{"role": "user", "content": "x"}], n=2, stream=True, stream_options={"include_usage": True}
    )
    news = [News(0, "a"), News(0, "", ended=ENDED), News(1, "", ended=ENDED)]
    *events, done = streamed(request, Replica(BEGUN, news))
    *chunks, last = map(json.loads, events)

    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop", "stop"]
    assert all(chunk["usage"] is None and "timings" not in chunk for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}
    assert last["timings"]["retrieval_ms"] == 3.0


@pytest.mark.parametrize(("failing", "code"), [(EngineFull("full"), "overloaded"), (60.0, "timeout")])
def test_a_stream_that_fails_ends_with_the_error_and_the_others_are_called_off(failing, code):
    request = CompletionRequest(prompt=["one", "two"], stream=True)
    other = Replica(BEGUN, [News(0, "a")], 60.0)
    *events, last = streamed(request, other, Replica(BEGUN, [News(0, "b")], failing), seconds=0.3)

    assert {json.loads(event)["choices"][0]["text"] for event in events} == {"", "a", "b"}
    assert json.loads(last)["error"]["code"] == code
    assert other.cancelled
