"""The places of an index's tasks in a replica, kept up to date from when somebody first asks for them."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from lorafleet.errors import LoRAFleetError
from lorafleet.weighing import Places

logger = logging.getLogger("ray.serve")

LOOK_SECONDS = 2.0
"""How often the index is asked whether it is another; learning starts so long after its change, at the latest."""


class Placing:
    """Learns the places once, and again where the index has changed: whoever asks meanwhile gets those before.

    Args:
        learn: the places as they are now; it is given the last ones.
    """

    def __init__(self, learn: Callable[[Places | None], Awaitable[Places]]) -> None:
        self._learn = learn
        self._last: Places | None = None
        self._first: asyncio.Task[Places] | None = None
        self._following: asyncio.Task[None] | None = None

    async def places(self) -> Places:
        """The last ones; who asks first waits for them.

        Raises:
            IndexUnavailable, IndexMismatch: there are none yet, and the index cannot be read.
        """
        if self._last is not None:
            return self._last
        if self._first is None or self._first.done():
            self._first = asyncio.create_task(self._begin())
        # Whoever hangs up leaves it to those who wait as well.
        return await asyncio.shield(self._first)

    async def _begin(self) -> Places:
        self._last = await self._learn(None)
        self._following = asyncio.create_task(self._follow())
        return self._last

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                self._last = await self._learn(self._last)
            except LoRAFleetError as error:
                # Requests are told so when they search; the places stay those of the index as it was.
                logger.debug("the index cannot be read: %s", error)
            except Exception:
                logger.exception("the places of the tasks cannot be learned")
