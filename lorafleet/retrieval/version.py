"""One version of the rows: a collection in Chroma, searched by inner product through an HNSW graph."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from chromadb.api.collection_configuration import UpdateCollectionConfiguration
from chromadb.api.models.Collection import Collection

from lorafleet.retrieval.connection import Connection, Gone
from lorafleet.retrieval.encoder import Vectors
from lorafleet.retrieval.neighbour import Neighbour
from lorafleet.retrieval.rows import Entry, task_of

QUERIES_AT_ONCE = 64
IDENTIFIERS_AT_ONCE = 20_000
ROWS_READ_AT_ONCE = 1000
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class StoredRows:
    """Rows as they are in the index.

    Attributes:
        vectors: float32 [entries, dimensions], bit for bit as they were written.
    """

    entries: list[Entry]
    vectors: Vectors


class Version:
    """The rows of one collection. Every method waits for a server that is away.

    Attributes:
        number: 1 for the first version of an index.

    Raises:
        IndexUnavailable: (every method) the server has not answered for `index.patience_seconds`.
        Gone: (every method) the collection was deleted.
    """

    def __init__(self, connection: Connection, collection: Collection, number: int) -> None:
        self.number = number
        self._connection = connection
        self._collection = collection

    @property
    def name(self) -> str:
        """The collection's name."""
        return self._collection.name

    @property
    def identity(self) -> str:
        """Another one for another collection of the same name."""
        return str(self._collection.id)

    @property
    def described(self) -> dict[str, Any]:
        """What was written down about it when it was made."""
        return dict(self._collection.metadata or {})

    @property
    def graph_fits(self) -> bool:
        """Whether its graph was built by the settings' `links` and `construction_breadth`, which never change in it."""
        graph, settings = self._graph(), self._connection.settings
        return (graph.get("max_neighbors"), graph.get("ef_construction")) == (settings.links, settings.construction_breadth)

    def set_search_breadth(self) -> None:
        """Bring the breadth of searches to the setting."""
        breadth = self._connection.settings.search_breadth
        if self._graph().get("ef_search") != breadth:
            wanted: UpdateCollectionConfiguration = {"hnsw": {"ef_search": breadth}}
            self._ask(lambda: self._collection.modify(configuration=wanted))

    def count(self) -> int:
        """How many rows it has."""
        return self._ask(self._collection.count)

    def identifiers(self, task: str | None = None) -> Iterator[list[str]]:
        """The identifiers of all rows, or of one task's, some thousands at a time."""
        where: Any = None if task is None else {"task": task}
        seen = 0
        while True:
            page = self._ask(
                lambda seen=seen: self._collection.get(  # type: ignore[misc]
                    where=where, include=[], limit=IDENTIFIERS_AT_ONCE, offset=seen
                )["ids"]
            )
            if page:
                yield page
            if len(page) < IDENTIFIERS_AT_ONCE:
                return
            seen += len(page)

    def counts(self) -> dict[str, int]:
        """How many rows each task has."""
        counts = Counter(task_of(identifier) for page in self.identifiers() for identifier in page)
        return dict(sorted(counts.items()))

    def read(self, identifiers: Sequence[str]) -> Iterator[StoredRows]:
        """Rows with their vectors, some hundreds at a time, in any order; identifiers that are not there are passed over."""
        for first in range(0, len(identifiers), ROWS_READ_AT_ONCE):
            part = list(identifiers[first : first + ROWS_READ_AT_ONCE])
            found = self._ask(
                lambda part=part: self._collection.get(ids=part, include=["embeddings", "metadatas"])  # type: ignore[misc]
            )
            described = found["metadatas"] or []
            entries = [
                Entry(identifier, str(row["task"]), str(row["text"]))
                for identifier, row in zip(found["ids"], described, strict=True)
            ]
            yield StoredRows(entries, np.asarray(found["embeddings"], dtype=np.float32))

    def write(self, entries: Sequence[Entry], embeddings: Vectors) -> None:
        """Write rows, replacing those with the same identifiers; those of one batch are all there or none.

        Args:
            embeddings: float32 [entries, dimensions], every row of length 1.
        """
        if len(entries) != len(embeddings):
            raise ValueError(f"{len(entries)} entries with {len(embeddings)} embeddings")
        step = self._connection.settings.write_batch
        for first in range(0, len(entries), step):
            part = entries[first : first + step]
            vectors = embeddings[first : first + step]
            self._ask(
                lambda part=part, vectors=vectors: self._collection.upsert(  # type: ignore[misc]
                    ids=[entry.identifier for entry in part],
                    embeddings=vectors,
                    metadatas=[{"task": entry.task, "text": entry.text} for entry in part],
                )
            )

    def delete(self, identifiers: Iterable[str]) -> None:
        """Delete rows; identifiers that are not there are passed over."""
        gone = sorted(identifiers)
        step = self._connection.settings.write_batch
        for first in range(0, len(gone), step):
            part = gone[first : first + step]
            self._ask(lambda part=part: self._collection.delete(ids=part))  # type: ignore[misc]

    def wake(self) -> None:
        """Ask it something: Chroma brings a graph up to date at the first question, and that is not to be a reader's."""
        some = self._ask(lambda: self._collection.get(limit=1, include=["embeddings"]))
        if len(some["ids"]):
            self.query(np.asarray(some["embeddings"], dtype=np.float32), 1)

    def query(
        self,
        embeddings: Vectors,
        neighbours: int,
        tasks: Sequence[str] | None = None,
        without: str | None = None,
        texts: bool = True,
    ) -> list[list[Neighbour]]:
        """As `CorpusIndex.query`."""
        include: Any = ["metadatas", "distances"] if texts else ["distances"]
        where = _filter(tasks, without)
        found: list[list[Neighbour]] = []
        for first in range(0, len(embeddings), QUERIES_AT_ONCE):
            vectors = embeddings[first : first + QUERIES_AT_ONCE]
            answer = self._ask(
                lambda vectors=vectors: self._collection.query(  # type: ignore[misc]
                    query_embeddings=vectors, n_results=neighbours, where=where, include=include
                )
            )
            if not texts:
                found += _without_texts(answer["ids"], answer["distances"] or [])
                continue
            for rows, distances in zip(answer["metadatas"] or [], answer["distances"] or [], strict=True):
                if None in rows:
                    # A search that was under way while the collection was deleted finds rows that say nothing any more.
                    raise Gone(self.name)
                found.append(
                    [
                        Neighbour(str(row["task"]), str(row["text"]), 1.0 - distance)
                        for row, distance in zip(rows, distances, strict=True)
                    ]
                )
        return found

    def _graph(self) -> dict[str, Any]:
        return dict(self._collection.configuration_json.get("hnsw") or {})

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        return self._connection.patiently(question)


def _without_texts(identifiers: Iterable[Sequence[str]], distances: Iterable[Sequence[float]]) -> list[list[Neighbour]]:
    """Neighbours by their identifiers alone, which say the task."""
    return [
        [Neighbour(task_of(row), "", 1.0 - distance) for row, distance in zip(rows, apart, strict=True)]
        for rows, apart in zip(identifiers, distances, strict=True)
    ]


def _filter(tasks: Sequence[str] | None, without: str | None) -> Any:
    conditions: list[dict[str, Any]] = []
    if tasks is not None:
        conditions.append({"task": {"$in": list(tasks)}})
    if without is not None:
        conditions.append({"task": {"$ne": without}})
    return {"$and": conditions} if len(conditions) > 1 else (conditions[0] if conditions else None)
