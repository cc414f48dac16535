"""Neighbours to task weights."""

import time
from collections.abc import Mapping
from typing import Any

from ray import serve

from lorafleet.adapters import stored_adapters
from lorafleet.config import Settings
from lorafleet.weighing import nucleus_weights
from serve.messages import Found, Weighed


@serve.deployment(name="Weigher")
class Weigher:
    """Weighs the tasks of a query's neighbours, over the tasks that have an adapter."""

    def __init__(self, settings: Settings) -> None:
        self._tasks = frozenset(stored_adapters(settings).adapters)
        self._p = settings.weighing.p

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Change settings without a restart: `p`, the nucleus of a query that does not say."""
        self._p = float(user_config["p"])

    async def weigh(self, found: Found, p: float | None = None) -> Weighed:
        """The task weights of a query."""
        start = time.perf_counter()
        weights = nucleus_weights(found.neighbours, p or self._p, among=self._tasks or None)
        return Weighed(dict(weights), weights.shares, found.milliseconds, 1000 * (time.perf_counter() - start))
