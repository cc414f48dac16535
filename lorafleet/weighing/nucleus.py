"""The nucleus of the neighbours' summed similarities (arXiv 2602.21222, inference)."""

from collections.abc import Collection, Iterable
from typing import Protocol

from lorafleet.weighing.weights import TaskWeights


class Similar(Protocol):
    """A row of a corpus near the query."""

    @property
    def task(self) -> str:
        """The task whose corpus holds it."""

    @property
    def similarity(self) -> float:
        """The cosine of the two embeddings."""


def nucleus_weights(neighbours: Iterable[Similar], p: float, among: Collection[str] | None = None) -> TaskWeights:
    """Sum the similarities of each task, take the heaviest tasks until their share reaches `p`, and normalise again.

    Rows that point away from the query (similarity below 0) count as 0. Of two tasks with equal sums the one whose name
    sorts first comes first.

    Args:
        p: above 0 and at most 1; 1 keeps every task that has a neighbour.
        among: only these tasks count (those that have an adapter); all where absent.

    Returns:
        Weights that sum to 1; empty where no neighbour counts.
    """
    sums: dict[str, float] = {}
    for neighbour in neighbours:
        if among is None or neighbour.task in among:
            sums[neighbour.task] = sums.get(neighbour.task, 0.0) + max(neighbour.similarity, 0.0)
    total = sum(sums.values())
    if total == 0:
        return TaskWeights({})
    shares = {task: mass / total for task, mass in sorted(sums.items(), key=lambda item: (-item[1], item[0])) if mass > 0}
    nucleus: dict[str, float] = {}
    reached = 0.0
    for task, share in shares.items():
        # A share sum of 1 minus rounding still reaches p = 1 only with the last task.
        if reached >= p:
            break
        nucleus[task] = share
        reached += share
    return TaskWeights({task: share / reached for task, share in nucleus.items()}, shares)
