"""Where the replicas stand, as the pool hears it from them."""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from serve.follower import POLL_SECONDS, Kind, Standing

LOST_SECONDS = 4 * POLL_SECONDS
"""A replica that has said nothing for so long is gone: a living one asks every POLL_SECONDS, or gives signs."""
LOOK_SECONDS = 0.05


class ReplicaFailed(Exception):
    """A replica could not take over a version; the text says why."""


class ReplicaLate(Exception):
    """A replica has not followed in time; the text says of which kind."""


@dataclass(frozen=True)
class _Heard:
    standing: Standing
    at: float


class Standings:
    """What every replica has said last, and who is heard of no more."""

    def __init__(self) -> None:
        self._heard: dict[str, _Heard] = {}
        self._sure_at = time.monotonic() + LOST_SECONDS

    def note(self, standing: Standing) -> None:
        """Hear a replica."""
        self._heard[standing.who] = _Heard(standing, time.monotonic())

    @property
    def left_out(self) -> Mapping[str, str]:
        """The adapters that a living generator cannot load, by task, with the reason of one."""
        return {task: reason for standing in self._living() for task, reason in standing.left_out.items()}

    async def everyone(
        self, kinds: Collection[Kind], reached: Callable[[Standing], bool], version: int, seconds: float
    ) -> None:
        """Wait until every living replica of some kinds has reached something.

        For LOST_SECONDS from the start nobody can know who lives: it takes that long at least.

        Raises:
            ReplicaFailed: one could not take over the version.
            ReplicaLate: one is not there after `seconds`.
        """
        deadline = max(time.monotonic() + seconds, self._sure_at)
        while True:
            living = [standing for standing in self._living() if standing.kind in kinds]
            for standing in living:
                if standing.failed and standing.seen == version:
                    raise ReplicaFailed(standing.failed)
            late = next((standing.kind for standing in living if not reached(standing)), None)
            if late is None and time.monotonic() >= self._sure_at:
                return
            if late is not None and time.monotonic() > deadline:
                raise ReplicaLate(f"a {late} has not followed in {seconds:.0f} s")
            await asyncio.sleep(LOOK_SECONDS)

    def _living(self) -> list[Standing]:
        oldest = time.monotonic() - LOST_SECONDS
        self._heard = {who: heard for who, heard in self._heard.items() if heard.at > oldest}
        return [heard.standing for heard in self._heard.values()]
