"""Intervals by the bootstrap: rows are drawn anew within each task, the same for every method, so differences are paired."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]
MASS = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Whether the interval leaves out 0: a difference that the rows bear out."""
        return self.low > 0 or self.high < 0


class Bootstrap:
    """Draws rows with replacement, again and again. The draws of a task hang on its name and the seed alone.

    Args:
        draws: how often.
    """

    def __init__(self, draws: int = 2000, seed: int = 0) -> None:
        self._draws, self._seed = draws, seed
        self._counts: dict[tuple[str, int], Scores] = {}

    def means(self, task: str, scores: Scores) -> Scores:
        """The mean score of each draw of a task's rows.

        Args:
            scores: float64 [rows].

        Returns:
            float64 [draws].
        """
        means: Scores = self._drawn(task, len(scores)) @ scores / len(scores)
        return means

    def mean(self, scores: Mapping[str, Scores]) -> Estimate:
        """The mean over tasks, every task counting the same."""
        return estimate(_mean(scores), self._means(scores))

    def difference(self, scores: Mapping[str, Scores], reference: Mapping[str, Scores]) -> Estimate:
        """The mean of `scores` less that of `reference`; both of the same tasks and rows."""
        return estimate(_mean(scores) - _mean(reference), self._means(scores) - self._means(reference))

    def ratio(self, scores: Mapping[str, Scores], reference: Mapping[str, Scores]) -> Estimate | None:
        """The mean of `scores` in per cent of that of `reference`; None where that can be 0."""
        drawn = self._means(reference)
        if _mean(reference) <= 0 or drawn.min() <= 0:
            return None
        return estimate(100 * _mean(scores) / _mean(reference), 100 * self._means(scores) / drawn)

    def _means(self, scores: Mapping[str, Scores]) -> Scores:
        means: Scores = np.mean([self.means(task, rows) for task, rows in scores.items()], axis=0)
        return means

    def _drawn(self, task: str, rows: int) -> Scores:
        """How often each row is drawn, float64 [draws, rows]."""
        if (task, rows) not in self._counts:
            draws = np.random.default_rng([self._seed, zlib.crc32(task.encode())])
            self._counts[task, rows] = draws.multinomial(rows, np.full(rows, 1 / rows), size=self._draws).astype(np.float64)
        return self._counts[task, rows]


def estimate(value: float, drawn: Scores) -> Estimate:
    """A figure with the interval that holds the middle 95 % of the drawn ones."""
    low, high = np.quantile(drawn, [(1 - MASS) / 2, (1 + MASS) / 2])
    return Estimate(value, float(low), float(high))


def _mean(scores: Mapping[str, Scores]) -> float:
    return float(np.mean([rows.mean() for rows in scores.values()]))
