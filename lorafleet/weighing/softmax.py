"""A softmax over the shares of the heaviest tasks (as LORAUTER does with similarities, arXiv 2601.21795)."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import islice

from lorafleet.weighing.shares import Similar, task_shares
from lorafleet.weighing.weights import TaskWeights


@dataclass(frozen=True)
class Softmax:
    """Takes the `k` heaviest tasks, and weighs them by the softmax of their shares.

    Attributes:
        temperature: above 0; small ones leave the heaviest task alone, large ones make all weights equal.
    """

    temperature: float = 0.2
    k: int = 3

    def weigh(self, neighbours: Iterable[Similar], among: Collection[str] | None = None) -> TaskWeights:
        """The weights of a query's neighbours, among these tasks."""
        shares = task_shares(neighbours, among)
        heaviest = max(shares.values(), default=0.0)
        masses = {task: math.exp((share - heaviest) / self.temperature) for task, share in islice(shares.items(), self.k)}
        return TaskWeights.normalised({task: mass for task, mass in masses.items() if mass > 0}, shares)
