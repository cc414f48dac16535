"""How replicas keep to the pool: each asks for the rosters again and again, takes what is new, and says what it has."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ray import serve
from ray.serve.handle import DeploymentHandle

from lorafleet.adapters import Roster
from lorafleet.errors import LoRAFleetError
from serve.errors import awaited, sentence

logger = logging.getLogger("ray.serve")

Kind = Literal["generator", "weigher", "gateway"]
POLL_SECONDS = 3.0
"""How long the pool keeps a question to which it has no news."""
SIGN_SECONDS = 1.0
"""How often a replica that is busy with what is new says that it lives."""
FIRST_SECONDS = 20.0
"""How long a replica that starts waits for the pool; without it, it begins with what is in storage."""
RETRY_SECONDS = 0.5


@dataclass(frozen=True)
class Published:
    """The state of the pool.

    Attributes:
        version: another one with every change; they are in no order.
        loaded: what generators hold.
        shown: what requests may name, and what is weighed.
        removing: names of adapters that are on their way out.
    """

    version: int = 0
    loaded: Roster = field(default_factory=Roster)
    shown: Roster = field(default_factory=Roster)
    removing: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Standing:
    """Where a replica stands.

    Attributes:
        who: one replica, until it ends.
        seen: the last version that it was told.
        has: the last version that it took over whole; another than `seen` while it is at it, or where it failed.
        drained: the last version since which no request is left that began before it.
        failed: why it could not take over `seen`.
        left_out: adapters of `has` that it cannot load, by task, with the reason of each.
    """

    who: str
    kind: Kind
    seen: int = 0
    has: int = 0
    drained: int = 0
    failed: str | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)


class Follower:
    """Keeps one replica to the pool. While the pool is away, the replica goes on with what it has.

    Args:
        take: makes the replica's own what was published; what it raises is reported, and it is tried again.
        drain: returns when all requests are over that began before it was called.
        left_out: the adapters that the replica cannot load, by task, with the reason of each.
    """

    def __init__(
        self,
        pool: DeploymentHandle,
        kind: Kind,
        take: Callable[[Published], Awaitable[None]],
        drain: Callable[[], Awaitable[None]] | None = None,
        left_out: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._pool, self._take, self._drain, self._left_out = pool, take, drain, left_out
        self._standing = Standing(serve.get_replica_context().replica_id.unique_id, kind)
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Catch up with the pool, and follow it from now on."""
        try:
            published = await asyncio.wait_for(self._ask(), FIRST_SECONDS)
        except Exception as error:
            logger.warning("the pool is away, this replica begins with what is in storage: %s", type(error).__name__)
        else:
            await self._catch_up(published)
        self._spawn(self._follow())

    async def _follow(self) -> None:
        while True:
            try:
                await self._catch_up(await self._ask())
            except Exception as error:
                # The pool is being restarted, or the cluster is: nothing that a replica could do about it.
                logger.debug("the pool does not answer: %s", error)
                await asyncio.sleep(RETRY_SECONDS)

    async def _ask(self) -> Published:
        published: Published = await awaited(self._pool.follow.remote(self._standing))
        return published

    async def _catch_up(self, published: Published) -> None:
        if published.version == self._standing.has:
            return
        self._standing = replace(self._standing, seen=published.version, failed=None)
        signs = asyncio.create_task(self._give_signs())
        try:
            await self._take(published)
        except Exception as error:
            problem = sentence(error) if isinstance(error, LoRAFleetError) else f"{type(error).__name__}: {error}"
            logger.warning("the pool's version %d cannot be taken over: %s", published.version, problem)
            self._standing = replace(self._standing, failed=problem)
        else:
            self._standing = replace(self._standing, has=published.version, left_out=dict(self._left_out()))
            self._spawn(self._say_when_drained(published.version))
        finally:
            signs.cancel()

    async def _give_signs(self) -> None:
        while True:
            await asyncio.sleep(SIGN_SECONDS)
            self._pool.note.remote(self._standing)

    async def _say_when_drained(self, version: int) -> None:
        if self._drain is not None:
            await self._drain()
        if self._standing.has == version:
            self._standing = replace(self._standing, drained=version)
            self._pool.note.remote(self._standing)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        # Kept, as the loop itself holds on to no task.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
