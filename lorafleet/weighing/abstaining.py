"""No adapters for a query that nothing is near to."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from lorafleet.weighing.shares import Similar, task_shares
from lorafleet.weighing.weigher import Weigher
from lorafleet.weighing.weights import TaskWeights


@dataclass(frozen=True)
class Abstaining:
    """Leaves the base model alone where the nearest row that counts is less similar than `below`, else asks a weigher.

    Shares cannot tell such a query from another: they sum to 1 however far away all rows are.
    """

    weigher: Weigher
    below: float

    def weigh(self, neighbours: Iterable[Similar], among: Collection[str] | None = None) -> TaskWeights:
        """The weigher's weights, or none, with the shares that there would have been.

        Args:
            neighbours: read twice.
        """
        similarities = [row.similarity for row in neighbours if among is None or row.task in among]
        if max(similarities, default=self.below) < self.below:
            return TaskWeights({}, task_shares(neighbours, among))
        return self.weigher.weigh(neighbours, among)
