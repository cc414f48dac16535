"""How much each task counts for a query."""

from collections.abc import Iterator, Mapping


class TaskWeights(Mapping[str, float]):
    """The weights of the tasks that a weigher chose, the heaviest first; they sum to 1.

    Args:
        weights: the tasks that take part.
        shares: every task's share of the neighbours' similarity, before any was cut off.
    """

    def __init__(self, weights: Mapping[str, float], shares: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights)
        self.shares = dict(weights if shares is None else shares)

    @classmethod
    def normalised(cls, masses: Mapping[str, float], shares: Mapping[str, float]) -> "TaskWeights":
        """The weights that stand to each other as these masses do."""
        total = sum(masses.values())
        return cls({task: mass / total for task, mass in masses.items()}, shares)

    def __getitem__(self, task: str) -> float:
        return self._weights[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __repr__(self) -> str:
        inside = ", ".join(f"{task!r}: {weight:.4f}" for task, weight in self.items())
        return f"TaskWeights({{{inside}}})"

    @property
    def nucleus(self) -> tuple[str, ...]:
        """The tasks that take part."""
        return tuple(self._weights)
