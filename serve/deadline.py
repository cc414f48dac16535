"""Until when a request has to be answered."""

import asyncio
import time
from collections.abc import Awaitable, Coroutine, Iterable
from typing import Any, TypeVar

Answer = TypeVar("Answer")


class Deadline:
    """A moment that all waiting for one request shares.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    async def within(self, answer: Awaitable[Answer]) -> Answer:
        """Wait for an answer.

        Raises:
            asyncio.TimeoutError: the moment has come before it.
        """
        return await asyncio.wait_for(answer, self._end - time.monotonic())

    async def all_within(self, parts: Iterable[Coroutine[Any, Any, Answer]]) -> list[Answer]:
        """Wait for all parts of an answer; with the first that fails, or is late, the others are called off.

        Raises:
            asyncio.TimeoutError: the moment has come before the last of them.
        """
        tasks = [asyncio.ensure_future(part) for part in parts]
        try:
            return await self.within(asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            raise
