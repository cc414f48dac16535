"""Neighbours to task weights."""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from lorafleet.adapters import stored_adapters
from lorafleet.config import Settings, Weighing
from lorafleet.errors import SettingsError
from lorafleet.weighing import BY_PLACE, Evidence, Places, make_weigher
from serve.calls import over_grpc
from serve.choosing import Wish
from serve.errors import awaited
from serve.follower import Follower, Published
from serve.messages import Found, Weighed
from serve.metrics import WeighingMetrics


@serve.deployment(name="Weigher")
class Weigher:
    """Weighs the tasks of a query's neighbours, over the tasks that have an adapter."""

    async def __init__(  # type: ignore[misc]
        self, settings: Settings, retriever: DeploymentHandle, pool: DeploymentHandle
    ) -> None:
        self._tasks = frozenset(stored_adapters(settings).adapters)
        self._weighing = settings.weighing
        self._retriever = over_grpc(retriever)
        self._places: Places | None = None
        self._metrics = WeighingMetrics()
        self._follower = Follower(pool, "weigher", self._take_tasks)
        await self._follower.start()

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Change settings without a restart: those of the section `weighing`; a request's own go before them."""
        self._weighing = Weighing(**{**self._weighing.model_dump(), **user_config})

    async def weigh(self, found: Found, wish: Wish) -> Weighed:
        """The task weights of a query.

        Raises:
            ApiError: 400 for a setting that the weigher does not have.
            SettingsError: its weigher asks where it lies, and the retriever has not said so.
            IndexUnavailable, IndexMismatch: nor can it say where the tasks lie.
        """
        start = time.perf_counter()
        name = wish.weigher or self._weighing.weigher
        wish.check(name)
        weigher = make_weigher(name, {**self._weighing.model_dump(), **wish.settings})
        if name in BY_PLACE:
            # Projections onto many tasks take their time.
            weights = await asyncio.to_thread(weigher.weigh, await self._evidence(found, name), self._tasks or None)
        else:
            weights = weigher.weigh(found.neighbours, among=self._tasks or None)
        weighed = Weighed(
            dict(weights),
            weights.shares,
            name,
            found.neighbours if wish.neighbours else None,
            found.milliseconds,
            1000 * (time.perf_counter() - start),
        )
        self._metrics.observe(found, weighed)
        return weighed

    async def _evidence(self, found: Found, weigher: str) -> Evidence:
        """All that is known of a query; the places are fetched where the retriever has had others since."""
        if found.embedding is None:
            raise SettingsError(
                f"the weigher is {weigher!r} by its user_config, and the retriever has not heard of it",
                "Give the same in the user_config of Retriever, or set weighing.weigher",
            )
        if self._places is None or self._places.index != found.places:
            self._places = await awaited(self._retriever.places.remote())
        return self._places.evidence(found.neighbours, found.embedding)

    async def _take_tasks(self, published: Published) -> None:
        self._tasks = frozenset(published.shown.adapters)
