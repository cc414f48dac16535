"""Neighbours to task weights."""

import time
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from lorafleet.adapters import stored_adapters
from lorafleet.config import Settings, Weighing
from lorafleet.weighing import make_weigher
from serve.choosing import Wish
from serve.follower import Follower, Published
from serve.messages import Found, Weighed
from serve.metrics import WeighingMetrics


@serve.deployment(name="Weigher")
class Weigher:
    """Weighs the tasks of a query's neighbours, over the tasks that have an adapter."""

    async def __init__(self, settings: Settings, pool: DeploymentHandle) -> None:  # type: ignore[misc]
        self._tasks = frozenset(stored_adapters(settings).adapters)
        self._weighing = settings.weighing
        self._metrics = WeighingMetrics()
        self._follower = Follower(pool, "weigher", self._take_tasks)
        await self._follower.start()

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Change settings without a restart: those of the section `weighing`; a request's own go before them."""
        self._weighing = Weighing(**{**self._weighing.model_dump(), **user_config})

    async def weigh(self, found: Found, wish: Wish) -> Weighed:
        """The task weights of a query."""
        start = time.perf_counter()
        name = wish.weigher or self._weighing.weigher
        weigher = make_weigher(name, {**self._weighing.model_dump(), **wish.settings})
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

    async def _take_tasks(self, published: Published) -> None:
        self._tasks = frozenset(published.shown.adapters)
