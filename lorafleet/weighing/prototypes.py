"""Each task's prototype, the mean of its rows' embeddings, and the tasks whose prototypes are nearest to a query."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prototypes:
    """The prototypes of some tasks (LoraRetriever, arXiv 2402.09997; sparse projection, arXiv 2410.09908).

    Attributes:
        tasks: their names.
        vectors: float32 [tasks, dimensions], the means of unit vectors.
    """

    tasks: tuple[str, ...]
    vectors: Vectors

    @classmethod
    def of(cls, means: Mapping[str, npt.ArrayLike]) -> "Prototypes":
        """The prototypes of tasks with these means."""
        tasks = tuple(sorted(means))
        return cls(tasks, np.array([means[task] for task in tasks], np.float32))

    def nearest(self, embedding: npt.ArrayLike, count: int, among: Collection[str] | None = None) -> "list[NearPrototype]":
        """The tasks whose prototypes have the largest cosine with a query, largest first.

        Args:
            embedding: [dimensions].
            among: only these tasks count; all where absent.
        """
        if not self.tasks:
            return []
        query = np.asarray(embedding, np.float32)
        lengths = np.linalg.norm(self.vectors, axis=1) * np.linalg.norm(query)
        cosines = (self.vectors @ query) / np.maximum(lengths, np.finfo(np.float32).tiny)
        counted = [place for place, task in enumerate(self.tasks) if among is None or task in among]
        counted.sort(key=lambda place: (-cosines[place], self.tasks[place]))
        return [NearPrototype(self.tasks[place], float(cosines[place]), self.vectors[place]) for place in counted[:count]]


@dataclass(frozen=True)
class NearPrototype:
    """A task's prototype near a query.

    Attributes:
        similarity: the cosine of the two.
        vector: float32 [dimensions].
    """

    task: str
    similarity: float
    vector: Vectors = field(repr=False)
