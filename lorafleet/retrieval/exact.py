"""Rows in memory, searched one and all: no server, no graph, no approximation. For measuring and for tests."""

from collections.abc import Mapping, Sequence

import numpy as np

from lorafleet.retrieval.encoder import Vectors
from lorafleet.retrieval.neighbour import Neighbour

QUERIES_AT_ONCE = 256


class ExactIndex:
    """What `CorpusIndex` searches, by comparing every query with every row.

    Args:
        texts: of each task, the keys of its rows.
        embeddings: of each task, float32 [rows, dimensions], every row of length 1.
    """

    def __init__(self, texts: Mapping[str, Sequence[str]], embeddings: Mapping[str, Vectors]) -> None:
        self._rows = [(task, text) for task, keys in texts.items() for text in keys]
        self._tasks = np.array([task for task, _ in self._rows])
        self._embeddings = np.concatenate([embeddings[task] for task in texts])
        if len(self._embeddings) != len(self._rows):
            raise ValueError(f"{len(self._rows)} rows with {len(self._embeddings)} embeddings")

    def counts(self) -> dict[str, int]:
        """How many rows each task has."""
        tasks, counts = np.unique(self._tasks, return_counts=True)
        return dict(zip(tasks.tolist(), counts.tolist(), strict=True))

    def query(
        self, embeddings: Vectors, neighbours: int, tasks: Sequence[str] | None = None, without: str | None = None
    ) -> list[list[Neighbour]]:
        """The rows nearest to each query, nearest first; fewer than asked for where there are not so many.

        Args:
            embeddings: float32 [queries, dimensions], every row of length 1.
            neighbours: how many rows for each query.
            tasks: only rows of these tasks.
            without: no row of this task (a task whose own adapter is masked).
        """
        allowed = self._tasks != without
        if tasks is not None:
            allowed &= np.isin(self._tasks, list(tasks))
        places = np.flatnonzero(allowed)
        rows, count = self._embeddings[places], min(neighbours, len(places))
        found: list[list[Neighbour]] = []
        for first in range(0, len(embeddings), QUERIES_AT_ONCE):
            similarities = embeddings[first : first + QUERIES_AT_ONCE] @ rows.T
            if count < len(places):
                near = np.sort(np.argpartition(-similarities, count, axis=1)[:, :count], axis=1)
            else:
                near = np.broadcast_to(np.arange(count), similarities.shape)
            closeness = np.take_along_axis(similarities, near, axis=1)
            order = np.argsort(-closeness, axis=1, kind="stable")
            near, closeness = np.take_along_axis(near, order, axis=1), np.take_along_axis(closeness, order, axis=1)
            for row, scores in zip(places[near].tolist(), closeness.tolist(), strict=True):
                found.append([self._neighbour(place, score) for place, score in zip(row, scores, strict=True)])
        return found

    def _neighbour(self, place: int, similarity: float) -> Neighbour:
        task, text = self._rows[place]
        return Neighbour(task, text, similarity)
