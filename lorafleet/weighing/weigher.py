"""What a weigher is."""

from collections.abc import Collection, Iterable
from typing import Protocol

from lorafleet.weighing.shares import Similar
from lorafleet.weighing.weights import TaskWeights


class Weigher(Protocol):
    """Turns a query's neighbours into task weights; its fields are its settings."""

    def weigh(self, neighbours: Iterable[Similar], among: Collection[str] | None = None) -> TaskWeights:
        """Weights that sum to 1, the heaviest first; empty where no neighbour counts.

        Args:
            among: only these tasks count (those that have an adapter); all where absent.
        """
