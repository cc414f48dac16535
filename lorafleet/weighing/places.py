"""Where the tasks of an index lie among the embeddings: learned from its rows once, and kept in a file."""

import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lorafleet.storage import file_in_one_step
from lorafleet.weighing.evidence import Evidence
from lorafleet.weighing.prototypes import Prototypes, Vectors
from lorafleet.weighing.router import Router, train_router
from lorafleet.weighing.row_sample import RowSample
from lorafleet.weighing.shares import Similar

LEARNED_ROWS = 100_000


@dataclass(frozen=True)
class Places:
    """What weighers that look at where a query lies are told.

    Attributes:
        router: None where there is one task alone.
        index: what tells the state of the index that they were learned from from any other.
    """

    prototypes: Prototypes
    router: Router | None = None
    index: str = ""

    def evidence(self, neighbours: Sequence[Similar], embedding: npt.ArrayLike) -> Evidence:
        """A query's neighbours, and where it lies itself.

        Args:
            embedding: [dimensions].
        """
        return Evidence(neighbours, np.asarray(embedding, np.float32), self.prototypes, self.router)


def learn_places(rows: Iterable[tuple[Sequence[str], Vectors]], index: str = "", most: int = LEARNED_ROWS) -> Places:
    """The places of the tasks of an index.

    Args:
        rows: some at a time: the task of each, and their vectors, float32 [rows, dimensions].
        index: what tells its state from any other.
        most: rows that the router learns from; the prototypes are the means of all.
    """
    sums: dict[str, npt.NDArray[np.float64]] = {}
    counts: Counter[str] = Counter()
    sample = RowSample(most)
    for names, vectors in rows:
        of_row = np.array(names)
        for task in dict.fromkeys(names):
            sums[task] = sums.get(task, 0.0) + vectors[of_row == task].sum(axis=0, dtype=np.float64)
        counts.update(names)
        sample.add(names, vectors)
    prototypes = Prototypes.of({task: total / counts[task] for task, total in sums.items()})
    return Places(prototypes, train_router(*sample.rows()) if len(sums) > 1 else None, index)


def write_places(path: Path, places: Places) -> None:
    """Keep them in one step."""
    arrays = {
        "index": np.array(places.index),
        "tasks": np.array(places.prototypes.tasks),
        "vectors": places.prototypes.vectors,
    }
    if places.router is not None:
        router = places.router
        arrays |= {"routed": np.array(router.tasks), "weights": router.weights, "biases": router.biases}
    with file_in_one_step(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_places(path: Path, index: str) -> Places | None:
    """The places kept of this index; None where there are none, or those of another, or the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["index"]) != index:
                return None
            prototypes = Prototypes(tuple(map(str, kept["tasks"])), kept["vectors"])
            router = Router(tuple(map(str, kept["routed"])), kept["weights"], kept["biases"]) if "routed" in kept else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return Places(prototypes, router, index)
