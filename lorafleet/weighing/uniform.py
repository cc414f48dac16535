"""The heaviest tasks, all with the same weight (LoraRetriever's compositions, arXiv 2402.09997)."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import islice

from lorafleet.weighing.shares import Similar, task_shares
from lorafleet.weighing.weights import TaskWeights


@dataclass(frozen=True)
class Uniform:
    """Takes the `k` heaviest tasks, and weighs them equally."""

    k: int = 3

    def weigh(self, neighbours: Iterable[Similar], among: Collection[str] | None = None) -> TaskWeights:
        """The weights of a query's neighbours, among these tasks."""
        shares = task_shares(neighbours, among)
        return TaskWeights.normalised(dict.fromkeys(islice(shares, self.k), 1.0), shares)
