"""As many rows of every task as there is room for, of an index that may have millions."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lorafleet.weighing.prototypes import Vectors

Marks = npt.NDArray[np.float64]


class RowSample:
    """Rows come some at a time, and of each task those stay that drew the lowest marks: each as likely as the others.

    Args:
        most: rows in all, the same number of each task; twice as many are held for a while. Every task keeps one at least.
    """

    def __init__(self, most: int, seed: int = 0) -> None:
        self._most = most
        self._draws = np.random.default_rng(seed)
        self._kept: dict[str, tuple[Marks, Vectors]] = {}
        self._rows = 0

    def add(self, tasks: Sequence[str], vectors: Vectors) -> None:
        """Rows that come.

        Args:
            tasks: of each row.
            vectors: float32 [rows, dimensions].
        """
        marks, names = self._draws.random(len(tasks)), np.array(tasks)
        for task in dict.fromkeys(tasks):
            of_task = names == task
            had_marks, had = self._kept.get(task, (marks[:0], vectors[:0]))
            self._kept[task] = np.concatenate([had_marks, marks[of_task]]), np.concatenate([had, vectors[of_task]])
        self._rows += len(tasks)
        if self._rows > 2 * self._most:
            self._thin()

    def rows(self) -> tuple[Vectors, list[str]]:
        """Those that stayed, float32 [rows, dimensions], and the task of each."""
        if self._rows > self._most:
            self._thin()
        tasks = [task for task, (marks, _) in self._kept.items() for _ in marks]
        return np.concatenate([vectors for _, vectors in self._kept.values()]), tasks

    def _thin(self) -> None:
        share = max(1, self._most // len(self._kept))
        for task, (marks, vectors) in self._kept.items():
            lowest = np.argsort(marks)[:share]
            self._kept[task] = marks[lowest], vectors[lowest]
        self._rows = sum(len(marks) for marks, _ in self._kept.values())
