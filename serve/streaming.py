"""Answers as they come: streams of deployments merged into one, and written as server-sent events."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentResponseGenerator
from starlette.types import Receive, Scope, Send

from jobs.cluster import cause_of
from serve.chunks import Chunks
from serve.deadline import Deadline
from serve.errors import as_api_error
from serve.messages import Begun, News
from serve.protocol.responses import ErrorResponse

logger = logging.getLogger("ray.serve")

DONE = b"data: [DONE]\n\n"


class Merged:
    """Streams of the generator, one for each prompt of a request, read as one.

    `close` calls off what has not come yet; it has to be called, whatever happens.
    """

    def __init__(self, responses: Sequence[DeploymentResponseGenerator[Any]]) -> None:
        self._responses = responses
        self._unfinished = set(range(len(responses)))
        self._news: asyncio.Queue[tuple[int, list[News] | Exception | None]] = asyncio.Queue()
        self._readers: list[asyncio.Task[None]] = []

    async def begun(self) -> list[Begun]:
        """How each order begins, once the engine has taken all of them.

        Raises:
            LoRAFleetError, RayError: one of them cannot be carried out.
        """
        return await asyncio.gather(*(_next(response) for response in self._responses))

    async def news(self, deadline: Deadline) -> AsyncIterator[tuple[int, list[News]]]:
        """What comes next of any of them, with the number of its prompt, until all have ended.

        Raises:
            asyncio.TimeoutError: the deadline has come.
            LoRAFleetError, RayError: one of them fails on its way.
        """
        self._readers = [asyncio.create_task(self._read(number)) for number in range(len(self._responses))]
        left = len(self._readers)
        while left:
            number, news = await deadline.within(self._news.get())
            if isinstance(news, Exception):
                raise news
            if news is None:
                left -= 1
            else:
                yield number, news

    def close(self) -> None:
        """Call off what has not come yet, down to the engine."""
        for reader in self._readers:
            reader.cancel()
        for number in self._unfinished:
            self._responses[number].cancel()

    async def _read(self, number: int) -> None:
        try:
            while True:
                self._news.put_nowait((number, await _next(self._responses[number])))
        except StopAsyncIteration:
            self._unfinished.discard(number)
            self._news.put_nowait((number, None))
        except Exception as error:
            self._news.put_nowait((number, error))


class EventStream(StreamingResponse):
    """An answer as server-sent events; whatever ends it, the streams that it is made from are closed."""

    def __init__(self, merged: Merged, begun: Sequence[Begun], chunks: Chunks[Any], deadline: Deadline) -> None:
        super().__init__(
            _events(merged, begun, chunks, deadline),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._merged = merged

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._merged.close()


def event(data: BaseModel) -> bytes:
    """One server-sent event, with the fields that were set."""
    return f"data: {data.model_dump_json(exclude_unset=True)}\n\n".encode()


async def _events(merged: Merged, begun: Sequence[Begun], chunks: Chunks[Any], deadline: Deadline) -> AsyncIterator[bytes]:
    """The whole stream: an error in its midst is its last event, and a stream that has [DONE] is whole."""
    try:
        yield _written(chunks.openings(begun))
        async for prompt, news in merged.news(deadline):
            yield _written(chunks.news(prompt, news))
        yield DONE
    except Exception as error:
        answer = as_api_error(error)
        if answer.status == 500:
            logger.error("a stream failed", exc_info=error)
        yield event(ErrorResponse.model_validate(answer.body()))


def _written(chunks: Iterable[BaseModel]) -> bytes:
    return b"".join(map(event, chunks))


async def _next(response: DeploymentResponseGenerator[Any]) -> Any:
    try:
        return await anext(response)
    except RayTaskError as error:
        raise cause_of(error) from None
