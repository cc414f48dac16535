"""The heaviest tasks, by their shares."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import islice

from lorafleet.weighing.shares import Similar, task_shares
from lorafleet.weighing.weights import TaskWeights


@dataclass(frozen=True)
class TopK:
    """Takes the `k` heaviest tasks, and normalises their shares again."""

    k: int = 3

    def weigh(self, neighbours: Iterable[Similar], among: Collection[str] | None = None) -> TaskWeights:
        """The weights of a query's neighbours, among these tasks."""
        shares = task_shares(neighbours, among)
        return TaskWeights.normalised(dict(islice(shares.items(), self.k)), shares)
