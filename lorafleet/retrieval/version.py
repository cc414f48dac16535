"""One version of the rows: a collection in Chroma, searched by inner product through an HNSW graph."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from typing import Any, TypeVar

import numpy as np
from chromadb.api.collection_configuration import UpdateCollectionConfiguration
from chromadb.api.models.Collection import Collection
from chromadb.api.types import GetResult

from lorafleet.retrieval.connection import Connection, Gone
from lorafleet.retrieval.encoder import Vectors
from lorafleet.retrieval.neighbour import Neighbour
from lorafleet.retrieval.records import Record, having_rows, not_only_of
from lorafleet.retrieval.rows import Entry, copies_of, digest_of, identifier_of, task_of

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
        """Count the vectors: rows with the same text have one."""
        return self._ask(self._collection.count)

    def identifiers(self, task: str | None = None) -> Iterator[list[str]]:
        """The identifiers of all rows, or of one task's, some thousands at a time."""
        where: Any = None if task is None else having_rows([task])
        seen = 0
        while True:
            page = self._ask(
                partial(self._collection.get, where=where, include=["metadatas"], limit=IDENTIFIERS_AT_ONCE, offset=seen)
            )
            digests, metadatas = page["ids"], page["metadatas"] or []
            if digests:
                yield [
                    identifier_of(one, digest, copies)
                    for digest, metadata in zip(digests, metadatas, strict=True)
                    for one, copies in Record.read(metadata).copies.items()
                    if task in (None, one)
                ]
            if len(digests) < IDENTIFIERS_AT_ONCE:
                return
            seen += len(digests)

    def counts(self) -> dict[str, int]:
        """How many rows each task has."""
        counts: Counter[str] = Counter()
        for page in self.identifiers():
            for identifier in page:
                counts[task_of(identifier)] += copies_of(identifier)
        return dict(sorted(counts.items()))

    def read(self, identifiers: Sequence[str]) -> Iterator[StoredRows]:
        """Rows with their vectors, some hundreds at a time, in any order; identifiers that are not there are passed over."""
        for first in range(0, len(identifiers), ROWS_READ_AT_ONCE):
            wanted = dict.fromkeys(identifiers[first : first + ROWS_READ_AT_ONCE])
            digests = list(dict.fromkeys(map(digest_of, wanted)))
            found = self._ask(partial(self._collection.get, ids=digests, include=["embeddings", "metadatas", "uris"]))
            entries, places = [], []
            for place, (digest, record) in enumerate(_records(found)):
                for task, copies in record.copies.items():
                    if (identifier := identifier_of(task, digest, copies)) in wanted:
                        entries.append(Entry(identifier, task, record.texts[task]))
                        places.append(place)
            yield StoredRows(entries, np.asarray(found["embeddings"], dtype=np.float32)[places])

    def write(self, entries: Sequence[Entry], embeddings: Vectors) -> None:
        """Write rows; a text that a task has already counts as often as it is written now.

        A text that is there keeps its vector: one that is written twice can cost others their links in the graph.

        Args:
            embeddings: float32 [entries, dimensions], every row of length 1; of rows with the same text the first counts.
        """
        if len(entries) != len(embeddings):
            raise ValueError(f"{len(entries)} entries with {len(embeddings)} embeddings")
        step = self._connection.settings.write_batch
        for first in range(0, len(entries), step):
            self._write(entries[first : first + step], embeddings[first : first + step])

    def delete(self, identifiers: Iterable[str]) -> None:
        """Delete rows; identifiers that are not there are passed over."""
        going: dict[str, set[str]] = {}
        for identifier in sorted(identifiers):
            going.setdefault(digest_of(identifier), set()).add(identifier)
        digests = list(going)
        for first in range(0, len(digests), ROWS_READ_AT_ONCE):
            found = self._found(digests[first : first + ROWS_READ_AT_ONCE])
            left = {
                digest: record.without(
                    task for task, copies in record.copies.items() if identifier_of(task, digest, copies) in going[digest]
                )
                for digest, record in found.items()
            }
            if gone := [digest for digest, record in left.items() if not record.copies]:
                self._ask(partial(self._collection.delete, ids=gone))
            self._change({digest: record for digest, record in left.items() if record.copies}, found)

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
        allowed = None if tasks is None else [task for task in tasks if task != without]
        if allowed == []:
            return [[] for _ in embeddings]
        where: Any = having_rows(allowed) if allowed else (None if without is None else not_only_of(without))
        include: Any = ["metadatas", "distances", *(["uris"] if texts else [])]
        found: list[list[Neighbour]] = []
        for first in range(0, len(embeddings), QUERIES_AT_ONCE):
            vectors = embeddings[first : first + QUERIES_AT_ONCE]
            answer = self._ask(
                partial(self._collection.query, query_embeddings=vectors, n_results=neighbours, where=where, include=include)
            )
            metadatas, distances = answer["metadatas"] or [], answer["distances"] or []
            uris = answer["uris"] if texts else [[""] * len(near) for near in metadatas]
            for near, named, apart in zip(metadatas, uris or [], distances, strict=True):
                if None in near or None in named:
                    # A search that was under way while the collection was deleted finds rows that say nothing any more.
                    raise Gone(self.name)
                records = map(Record.read, near, named)
                rows = _spread(records, apart, lambda task: task != without and (allowed is None or task in allowed))
                found.append(list(islice(rows, neighbours)))
        return found

    def _graph(self) -> dict[str, Any]:
        return dict(self._collection.configuration_json.get("hnsw") or {})

    def _write(self, entries: Sequence[Entry], embeddings: Vectors) -> None:
        coming: dict[str, Record] = {}
        places: dict[str, int] = {}
        for place, entry in enumerate(entries):
            digest = digest_of(entry.identifier)
            places.setdefault(digest, place)
            row = Record({entry.task: copies_of(entry.identifier)}, {entry.task: entry.text})
            coming[digest] = coming[digest].having(row) if digest in coming else row
        there = self._found(list(coming))
        if new := [digest for digest in coming if digest not in there]:
            self._ask(
                lambda: self._collection.upsert(
                    ids=new,
                    embeddings=embeddings[[places[digest] for digest in new]],
                    metadatas=[coming[digest].metadata for digest in new],
                    uris=[coming[digest].uri for digest in new],
                )
            )
        self._change({digest: record.having(coming[digest]) for digest, record in there.items()}, there)

    def _found(self, digests: Sequence[str]) -> dict[str, Record]:
        """Read the records of these digests that exist."""
        found: dict[str, Record] = {}
        for first in range(0, len(digests), ROWS_READ_AT_ONCE):
            part = list(digests[first : first + ROWS_READ_AT_ONCE])
            answer = self._ask(partial(self._collection.get, ids=part, include=["metadatas", "uris"]))
            found.update(_records(answer))
        return found

    def _change(self, records: Mapping[str, Record], before: Mapping[str, Record]) -> None:
        """Update the rows of existing records; their vectors stay."""
        changed = [digest for digest, record in records.items() if record != before[digest]]
        if changed:
            self._ask(
                lambda: self._collection.update(
                    ids=changed,
                    metadatas=[records[digest].metadata for digest in changed],
                    uris=[records[digest].uri for digest in changed],
                )
            )

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        return self._connection.patiently(question)


def _records(found: GetResult) -> Iterator[tuple[str, Record]]:
    for digest, metadata, uri in zip(found["ids"], found["metadatas"] or [], found["uris"] or [], strict=True):
        yield digest, Record.read(metadata, uri)


def _spread(records: Iterable[Record], apart: Sequence[float], counted: Callable[[str], bool]) -> Iterator[Neighbour]:
    """The rows of records as neighbours, one by one."""
    for record, distance in zip(records, apart, strict=True):
        for task, copies in record.copies.items():
            if counted(task):
                yield from repeat(Neighbour(task, record.texts.get(task, ""), 1.0 - distance), copies)
