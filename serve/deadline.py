"""Until when a request has to be answered."""

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

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
