"""What every weigher begins with: each task's share of the neighbours' similarity."""

from collections.abc import Collection, Iterable
from typing import Protocol


class Similar(Protocol):
    """A row of a corpus near the query."""

    @property
    def task(self) -> str:
        """The task whose corpus holds it."""

    @property
    def similarity(self) -> float:
        """The cosine of the two embeddings."""


def task_shares(neighbours: Iterable[Similar], among: Collection[str] | None = None) -> dict[str, float]:
    """The summed similarities of each task, normalised; the heaviest task first.

    Rows that point away from the query (similarity below 0) count as 0. Of two tasks with equal sums the one whose name
    sorts first comes first.

    Args:
        among: only these tasks count (those that have an adapter); all where absent.

    Returns:
        Shares above 0 that sum to 1; empty where no neighbour counts.
    """
    sums: dict[str, float] = {}
    for neighbour in neighbours:
        if among is None or neighbour.task in among:
            sums[neighbour.task] = sums.get(neighbour.task, 0.0) + max(neighbour.similarity, 0.0)
    total = sum(sums.values())
    return {task: mass / total for task, mass in sorted(sums.items(), key=lambda item: (-item[1], item[0])) if mass > 0}
