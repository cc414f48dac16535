"""What the engine's thread tells of requests, brought into an event loop."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from lorafleet.engine import Generation, GenerationRequest, Piece

if TYPE_CHECKING:
    from lorafleet.engine import Engine


class Answering:
    """Requests that the engine has taken, heard together: their pieces as they come, and each one's end.

    Args:
        requests: all are submitted at once, or none.

    Raises:
        RequestError, UnknownAdapter, CompositionError, EngineFull: the engine does not take one of them.
    """

    def __init__(self, engine: "Engine", requests: Sequence[GenerationRequest]) -> None:
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[tuple[int, Piece | Future[Generation]]] = asyncio.Queue()
        self._futures: list[Future[Generation]] = []
        try:
            for number, request in enumerate(requests):
                future = engine.submit(request, partial(self._hear, number))
                self._futures.append(future)
                future.add_done_callback(partial(self._hear, number))
        except BaseException:
            self.cancel()
            raise

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Piece | Generation]]]:
        """All that has come since the last time, each with the number of its request, until all have ended.

        Raises:
            LoRAFleetError: a request fails in the engine.
        """
        left = len(self._futures)
        while left:
            heard = [await self._heard.get()]
            while not self._heard.empty():
                heard.append(self._heard.get_nowait())
            news = [(number, what if isinstance(what, Piece) else what.result()) for number, what in heard]
            left -= sum(isinstance(what, Generation) for _, what in news)
            yield news

    def cancel(self) -> None:
        """Free what the requests hold that have not ended."""
        for future in self._futures:
            future.cancel()

    def _hear(self, number: int, what: "Piece | Future[Generation]") -> None:
        """Called from the engine's thread."""
        self._loop.call_soon_threadsafe(self._heard.put_nowait, (number, what))
