"""The nucleus of the neighbours' summed similarities (arXiv 2602.21222, inference)."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from lorafleet.weighing.shares import Similar, task_shares
from lorafleet.weighing.weights import TaskWeights


@dataclass(frozen=True)
class Nucleus:
    """Takes the heaviest tasks until their share reaches `p`, and normalises their shares again.

    Attributes:
        p: above 0 and at most 1; 1 keeps every task that has a neighbour.
    """

    p: float = 0.9

    def weigh(self, neighbours: Iterable[Similar], among: Collection[str] | None = None) -> TaskWeights:
        """The weights of a query's neighbours, among these tasks."""
        shares = task_shares(neighbours, among)
        nucleus: dict[str, float] = {}
        reached = 0.0
        for task, share in shares.items():
            # A share sum of 1 minus rounding still reaches p = 1 only with the last task.
            if reached >= self.p:
                break
            nucleus[task] = share
            reached += share
        return TaskWeights.normalised(nucleus, shares)
