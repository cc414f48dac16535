"""The rows of the corpora in Chroma, searched by cosine through an HNSW graph (arXiv 2602.21222, index construction).

One collection holds all tasks. Its metadata says which encoder made it; its rows carry `task` and `text`. A row's identifier
follows from its task and its key, so that writing a corpus again changes nothing.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import chromadb
import chromadb.config
import httpx
from chromadb.api import ClientAPI
from chromadb.api.collection_configuration import CreateHNSWConfiguration, UpdateCollectionConfiguration
from chromadb.api.models.Collection import Collection
from chromadb.errors import ChromaAuthError, ChromaError, InternalError, NotFoundError, RateLimitError
from tenacity import RetryError, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from lorafleet.config import Index, Settings
from lorafleet.errors import IndexMismatch, IndexUnavailable
from lorafleet.models import fingerprint
from lorafleet.retrieval import server
from lorafleet.retrieval.encoder import Vectors

SCHEMA = 1
QUERIES_AT_ONCE = 64
# Chroma's own client waits for an answer for ever; the longest honest one is the first query after a large write.
ANSWER_SECONDS = 120.0
LONGEST_PAUSE_SECONDS = 5.0
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Entry:
    """A row to be written.

    Attributes:
        identifier: as `row_identifiers` gives it.
        text: the example's key, the text that was embedded.
    """

    identifier: str
    task: str
    text: str


@dataclass(frozen=True)
class Neighbour:
    """A row near a query; `similarity` is the cosine of the two embeddings."""

    task: str
    text: str
    similarity: float


def row_identifiers(task: str, keys: Iterable[str]) -> list[str]:
    """One identifier for every key of a corpus, in order: task, digest of the key, and how often it came before.

    A key may stand twice in a corpus, with two answers; both rows count when neighbours are weighed.
    """
    seen: Counter[str] = Counter()
    identifiers = []
    for key in keys:
        digest = hashlib.sha256(key.encode()).hexdigest()[:20]
        identifiers.append(f"{task}-{digest}-{seen[digest]}")
        seen[digest] += 1
    return identifiers


class CorpusIndex:
    """The collection of one encoder's embeddings. Safe to use from several threads.

    Every method waits for a server that is away, up to `index.patience_seconds`.

    Raises:
        IndexUnavailable: (every method) the server has not answered for so long.
        IndexMismatch: (every method that searches or changes rows) the collection was dropped meanwhile.
    """

    def __init__(self, client: ClientAPI, settings: Index, encoder: str, place: str) -> None:
        """Find the collection; it may be missing yet.

        Args:
            client: a connection to Chroma.
            settings: of the index.
            encoder: fingerprint of the encoder that embeds the queries and the rows.
            place: the server or folder, for people.
        """
        self.place = place
        self._client = client
        self._settings = settings
        self._encoder = encoder
        self._collection = self._patiently(self._find)

    def check_encoder(self) -> None:
        """Refuse a collection that another encoder made; one that is not there yet is fine.

        Raises:
            IndexMismatch: by another encoder, by another version of LoRAFleet, or not by LoRAFleet at all.
        """
        if self._collection is None:
            return
        described = self._collection.metadata or {}
        for name, found, wanted in (
            ("schema", described.get("schema"), SCHEMA),
            ("encoder", described.get("encoder"), self._encoder),
        ):
            if found != wanted:
                raise IndexMismatch(
                    f"the index {self._settings.collection!r} at {self.place} has {name} {found}, not {wanted}",
                    "Embed again with: lorafleet embed --rebuild",
                )

    def check_filled(self) -> None:
        """Refuse a collection without rows.

        Raises:
            IndexMismatch: it is missing or empty.
        """
        if self._collection is None or self._ask(lambda collection: collection.count()) == 0:
            raise self._missing()

    def check_graph(self) -> None:
        """Bring the graph's search breadth to the setting, and refuse a graph that was built by other settings.

        Raises:
            IndexMismatch: `index.links` or `index.construction_breadth` has changed; both are fixed when a graph is built.
        """
        if self._collection is None:
            return
        graph = dict(self._collection.configuration_json.get("hnsw") or {})
        for setting, name, wanted in (
            ("links", "max_neighbors", self._settings.links),
            ("construction_breadth", "ef_construction", self._settings.construction_breadth),
        ):
            if graph.get(name) != wanted:
                raise IndexMismatch(
                    f"the index was built with index.{setting} = {graph.get(name)}, and the settings say {wanted}",
                    f"Set it back, or build it anew with: lorafleet embed --rebuild --set index.{setting}={wanted}",
                )
        if graph.get("ef_search") != self._settings.search_breadth:
            breadth: UpdateCollectionConfiguration = {"hnsw": {"ef_search": self._settings.search_breadth}}
            self._ask(lambda collection: collection.modify(configuration=breadth))

    def identifiers(self, task: str) -> set[str]:
        """The identifiers of the rows of a task."""
        if self._collection is None:
            return set()
        return set(self._ask(lambda collection: collection.get(where={"task": task}, include=[])["ids"]))

    def counts(self) -> dict[str, int]:
        """How many rows each task has."""
        if self._collection is None:
            return {}
        everything = self._ask(lambda collection: collection.get(include=[])["ids"])
        return dict(sorted(Counter(identifier.rsplit("-", 2)[0] for identifier in everything).items()))

    def write(self, entries: Sequence[Entry], embeddings: Vectors) -> None:
        """Write rows, replacing those with the same identifiers; the first write makes the collection.

        Args:
            embeddings: float32 [entries, dimensions], every row of length 1.
        """
        if len(entries) != len(embeddings):
            raise ValueError(f"{len(entries)} entries with {len(embeddings)} embeddings")
        if not entries:
            return
        if self._collection is None:
            self._collection = self._patiently(lambda: self._create(embeddings.shape[1]))
        step = self._settings.write_batch
        for first in range(0, len(entries), step):
            part = entries[first : first + step]
            vectors = embeddings[first : first + step]
            self._ask(
                lambda collection, part=part, vectors=vectors: collection.upsert(  # type: ignore[misc]
                    ids=[entry.identifier for entry in part],
                    embeddings=vectors,
                    metadatas=[{"task": entry.task, "text": entry.text} for entry in part],
                )
            )

    def delete(self, identifiers: Iterable[str]) -> None:
        """Delete rows; identifiers that are not there are passed over."""
        gone = sorted(identifiers)
        step = self._settings.write_batch
        for first in range(0, len(gone), step):
            part = gone[first : first + step]
            self._ask(lambda collection, part=part: collection.delete(ids=part))  # type: ignore[misc]

    def delete_task(self, task: str) -> None:
        """Delete all rows of a task; nothing happens where there are none."""
        self.delete(self.identifiers(task))

    def drop(self) -> None:
        """Delete the collection with all its rows."""
        if self._collection is not None:
            self._patiently(self._delete_collection)
            self._collection = None

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
        where = _filter(tasks, without)
        found: list[list[Neighbour]] = []
        for first in range(0, len(embeddings), QUERIES_AT_ONCE):
            vectors = embeddings[first : first + QUERIES_AT_ONCE]
            answer = self._ask(
                lambda collection, vectors=vectors: collection.query(  # type: ignore[misc]
                    query_embeddings=vectors, n_results=neighbours, where=where, include=["metadatas", "distances"]
                )
            )
            for rows, distances in zip(answer["metadatas"], answer["distances"], strict=True):
                found.append(
                    [
                        Neighbour(str(row["task"]), str(row["text"]), 1.0 - distance)
                        for row, distance in zip(rows, distances, strict=True)
                    ]
                )
        return found

    def _find(self) -> Collection | None:
        try:
            # No embedding function: rows and queries are embedded here, and Chroma's default would fetch a model.
            return self._client.get_collection(self._settings.collection, embedding_function=None)
        except NotFoundError:
            return None

    def _create(self, dimensions: int) -> Collection:
        graph: CreateHNSWConfiguration = {
            "space": "cosine",
            "ef_construction": self._settings.construction_breadth,
            "ef_search": self._settings.search_breadth,
            "max_neighbors": self._settings.links,
        }
        return self._client.get_or_create_collection(
            self._settings.collection,
            metadata={"schema": SCHEMA, "encoder": self._encoder, "dimensions": dimensions},
            configuration={"hnsw": graph},
            embedding_function=None,
        )

    def _delete_collection(self) -> None:
        try:
            self._client.delete_collection(self._settings.collection)
        except NotFoundError:
            return

    def _ask(self, question: Callable[[Collection], Answer]) -> Answer:
        """Ask the collection; one that was dropped and made anew under its name since is found again."""

        def attempt() -> Answer:
            try:
                if self._collection is not None:
                    return question(self._collection)
            except NotFoundError:
                self._collection = None
            self._collection = self._find()
            self.check_encoder()
            if self._collection is None:
                raise self._missing()
            return question(self._collection)

        return self._patiently(attempt)

    def _missing(self) -> IndexMismatch:
        return IndexMismatch(f"the index {self._settings.collection!r} at {self.place} is empty", "Run: lorafleet embed")

    def _patiently(self, action: Callable[[], Answer]) -> Answer:
        patience = self._settings.patience_seconds
        retrying = Retrying(
            stop=stop_after_delay(patience),
            wait=wait_random_exponential(multiplier=0.2, max=LONGEST_PAUSE_SECONDS),
            retry=retry_if_exception(_passing),
        )
        try:
            return retrying(action)
        except RetryError as error:
            cause = error.last_attempt.exception()
            raise IndexUnavailable(
                f"Chroma at {self.place} has not answered for {patience:.0f} s ({_described(cause)})",
                "What was written is safe: bring the server back (here: lorafleet up) and run the same again",
            ) from None
        except ChromaError as error:
            raise IndexUnavailable(f"Chroma at {self.place} refuses: {_described(error)}") from None


def open_index(settings: Settings) -> CorpusIndex:
    """The index, to be searched: over HTTP, or straight from its folder where no server of this machine runs.

    Raises:
        IndexUnavailable: no server answers, and there is no folder to open.
        IndexMismatch: there is nothing in it, or another encoder made it.
    """
    url = settings.index.url
    if server.answers(settings.index):
        index = _over_http(settings)
    elif server.on_this_machine(url) and (settings.chroma / "chroma.sqlite3").is_file() and not server.running(settings):
        client = chromadb.PersistentClient(str(settings.chroma), settings=_quiet())
        index = CorpusIndex(client, settings.index, _encoder_of(settings), str(settings.chroma))
    else:
        raise _no_answer(url)
    index.check_encoder()
    index.check_filled()
    return index


def open_for_writing(settings: Settings) -> CorpusIndex:
    """The index on its server, to be written to; it may be missing yet, and its encoder is not checked.

    Raises:
        IndexUnavailable: no server answers.
    """
    if not server.answers(settings.index):
        raise _no_answer(settings.index.url)
    return _over_http(settings)


def _over_http(settings: Settings) -> CorpusIndex:
    url = settings.index.url
    try:
        client: Any = chromadb.HttpClient(url, headers=server.token_headers(settings.index), settings=_quiet())
    except (ValueError, ChromaAuthError, httpx.HTTPError) as error:
        raise IndexUnavailable(
            f"the Chroma server at index.url = {url} refuses the connection: {_described(error)}", "Check index.token"
        ) from None
    client._server._session.timeout = httpx.Timeout(ANSWER_SECONDS, connect=LONGEST_PAUSE_SECONDS)
    return CorpusIndex(client, settings.index, _encoder_of(settings), url)


def _quiet() -> chromadb.config.Settings:
    return chromadb.config.Settings(anonymized_telemetry=False)


def _no_answer(url: str) -> IndexUnavailable:
    mend = "lorafleet up" if server.on_this_machine(url) else "start it there, or set index.url"
    return IndexUnavailable(f"no Chroma server answers at index.url = {url}", f"Start one: {mend}")


def _encoder_of(settings: Settings) -> str:
    return fingerprint(settings.models.encoder, settings.models.encoder_revision)


def _filter(tasks: Sequence[str] | None, without: str | None) -> Any:
    conditions: list[dict[str, Any]] = []
    if tasks is not None:
        conditions.append({"task": {"$in": list(tasks)}})
    if without is not None:
        conditions.append({"task": {"$ne": without}})
    return {"$and": conditions} if len(conditions) > 1 else (conditions[0] if conditions else None)


def _passing(error: BaseException) -> bool:
    """Whether a fault may pass by itself: the server is away, restarts, or has too much to do."""
    if isinstance(error, (httpx.TransportError, InternalError, RateLimitError)):
        return True
    # What a proxy says for a server that is away, Chroma's client raises as a bare Exception with the page's text.
    answer = error.__context__
    return isinstance(answer, httpx.HTTPStatusError) and answer.response.status_code in (429, 502, 503, 504)


def _described(error: BaseException | None) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
