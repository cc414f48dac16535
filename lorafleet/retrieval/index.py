"""The index of all corpora, searched by cosine (arXiv 2602.21222, index construction).

The rows lie in a collection called a version (`lorafleet-v3`). A collection with the index's own name (`lorafleet`) holds no
rows: its metadata is the manifest, and that names the version which is searched. It changes in one step, so whoever asks
finds the index before a run of indexing or the one after it, and never something between.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from itertools import chain
from typing import TypeVar

from lorafleet.config import Settings
from lorafleet.errors import IndexMismatch
from lorafleet.models import fingerprint
from lorafleet.retrieval.connection import Connection, Gone, Refused, connected, connected_for_reading
from lorafleet.retrieval.encoder import Vectors
from lorafleet.retrieval.lock import one_at_a_time
from lorafleet.retrieval.manifest import FILE, REBUILD, Manifest, manifest_of, read_manifest, write_manifest
from lorafleet.retrieval.neighbour import Neighbour
from lorafleet.retrieval.rows import Entry, copies_of, task_of
from lorafleet.retrieval.version import Version

SCHEMA = 3
PLAIN_FORMS = ("instruction",)
LOCK = ".index.lock"
Answer = TypeVar("Answer")


class CorpusIndex:
    """The version that is searched, whichever that is when a method is called. Safe to use from several threads.

    Every method waits for a server that is away, up to `index.patience_seconds`.

    Attributes:
        place: the server or folder, for people.
        encoder: fingerprint of the encoder that embeds queries and rows.
        prompts: the version of the prompts, as `lorafleet.tasks.prompt_version` gives it, and the forms of a row's text that
            are embedded, where those are not its key alone.

    Raises:
        IndexUnavailable: (every method) the server has not answered for so long.
        IndexMismatch: (every method that searches or changes rows) there is no index any more, or another encoder's.
    """

    def __init__(self, connection: Connection, settings: Settings, prompts: str) -> None:
        self.place = connection.place
        self.encoder = fingerprint(settings.models.encoder, settings.models.encoder_revision)
        self.prompts = "-".join((prompts, *forms)) if (forms := settings.index.embedded) != PLAIN_FORMS else prompts
        self.connection = connection
        self._settings = settings
        self._name = settings.index.collection
        self._seen: Version | None = None

    def manifest(self) -> Manifest | None:
        """The manifest as it is now; None where there is no index.

        Raises:
            IndexMismatch: it is of another version of LoRAFleet, or not of LoRAFleet at all.
        """
        collection = self.connection.find(self._name)
        if collection is None:
            return None
        described = collection.metadata or {}
        manifest = manifest_of(json.loads(described["manifest"])) if described.get("schema") == SCHEMA else None
        if manifest is None:
            schema = described.get("schema")
            raise IndexMismatch(f"the index {self._name!r} at {self.place} has schema {schema}, not {SCHEMA}", REBUILD)
        return manifest

    def check(self) -> None:
        """Refuse an index that another encoder or other prompts made; one that is not there yet is fine.

        Raises:
            IndexMismatch: it is so, or it is of another version of LoRAFleet.
        """
        manifest = self.manifest()
        if manifest is not None:
            manifest.check(self.encoder, self.prompts)

    def check_filled(self) -> None:
        """Refuse an index without rows.

        Raises:
            IndexMismatch: it is missing or empty.
        """
        if self._searching(lambda version: version.count()) == 0:
            raise self._missing()

    def identifiers(self, task: str) -> set[str]:
        """The identifiers of the rows of a task."""
        if self.manifest() is None:
            return set()
        return self._searching(lambda version: {identifier for page in version.identifiers(task) for identifier in page})

    def counts(self) -> dict[str, int]:
        """How many rows each task has."""
        return {} if self.manifest() is None else self._searching(lambda version: version.counts())

    def query(
        self,
        embeddings: Vectors,
        neighbours: int,
        tasks: Sequence[str] | None = None,
        without: str | None = None,
        texts: bool = True,
    ) -> list[list[Neighbour]]:
        """The rows nearest to each query, nearest first; fewer than asked for where there are not so many.

        Rows with the same text are one vector in Chroma, and as many neighbours here as there are rows. All queries of one
        call are answered by the same version.

        Args:
            embeddings: float32 [queries, dimensions], every row of length 1.
            neighbours: how many rows for each query.
            tasks: only rows of these tasks.
            without: no row of this task (a task whose own adapter is masked).
            texts: whether the rows' texts are wanted: without them an answer is shorter.
        """
        return self._searching(lambda version: version.query(embeddings, neighbours, tasks, without, texts))

    def write(self, entries: Sequence[Entry], embeddings: Vectors) -> None:
        """Write rows straight into the version that is searched; the first write makes the index.

        So come the rows of an adapter that is added while the endpoint runs: nobody asks for its task yet.

        Args:
            embeddings: float32 [entries, dimensions], every row of length 1.
        """
        with self.changing():
            self.check()
            manifest = self.manifest() or self.plan(1)
            version = self.version(manifest.version) or self.create(manifest.version)
            version.write(entries, embeddings)
            self._recount(manifest, version, {entry.task for entry in entries})

    def delete(self, identifiers: Iterable[str]) -> None:
        """Delete rows of the version that is searched; identifiers that are not there are passed over."""
        gone = set(identifiers)
        with self.changing():
            self._delete(gone, {task_of(identifier) for identifier in gone})

    def delete_task(self, task: str) -> None:
        """Delete all rows of a task; nothing happens where there are none."""
        with self.changing():
            self._delete(self.identifiers(task), {task})

    def drop(self) -> None:
        """Delete the index with all its versions."""
        with self.changing():
            self.connection.delete(self._name)
            for number in self.numbers():
                self.delete_version(number)
            (self._settings.state / FILE).unlink(missing_ok=True)

    def changing(self) -> AbstractContextManager[None]:
        """Held by whoever changes what is searched, so that no row of two who do is lost between them."""
        return one_at_a_time(
            self._settings.state / LOCK,
            self._settings.index.patience_seconds,
            "another process changes the index just now",
            "Try again in a moment",
        )

    def current(self) -> Version | None:
        """The version that is searched; None where there is no index.

        Raises:
            IndexMismatch: another encoder or other prompts made it.
        """
        manifest = self.manifest()
        while manifest is not None:
            seen = self._seen
            if seen is None or seen.number != manifest.version:
                manifest.check(self.encoder, self.prompts)
                seen = self._seen = self.version(manifest.version)
            if seen is not None:
                return seen
            before, manifest = manifest, self.manifest()
            if manifest == before:
                break
        return None

    def version(self, number: int) -> Version | None:
        """A version, searched or not; None where there is none of that number."""
        collection = self.connection.find(self._name_of(number))
        return None if collection is None else Version(self.connection, collection, number)

    def numbers(self) -> list[int]:
        """The numbers of all versions that there are, searched or not, in order."""
        prefix = self._name_of("")
        numbers = (name.removeprefix(prefix) for name in self.connection.names(prefix))
        return sorted(int(number) for number in numbers if number.isdecimal())

    def create(self, number: int, rebuild: bool = False) -> Version:
        """A new version without rows, which nobody searches yet.

        Args:
            rebuild: whether no vector of another version comes into it.
        """
        described = {"schema": SCHEMA, "encoder": self.encoder, "prompts": self.prompts, "rebuild": rebuild}
        return Version(self.connection, self.connection.create(self._name_of(number), described), number)

    def delete_version(self, number: int) -> None:
        """Delete a version with all its rows."""
        self.connection.delete(self._name_of(number))

    def plan(self, number: int) -> Manifest:
        """The manifest of a version without rows."""
        models, index = self._settings.models, self._settings.index
        return Manifest(
            encoder=models.encoder,
            revision=models.encoder_revision,
            fingerprint=self.encoder,
            prompts=self.prompts,
            url=index.url,
            collection=index.collection,
            version=number,
        )

    def publish(self, manifest: Manifest) -> None:
        """Let the index be what the manifest says, in one step; whoever holds `changing` may do so."""
        described = {"schema": SCHEMA, "manifest": json.dumps(asdict(manifest))}
        collection = self.connection.find(self._name)
        if collection is not None and (collection.metadata or {}).get("schema") != SCHEMA:
            # An index of another version of LoRAFleet, which no reader of this one takes.
            self.connection.delete(self._name)
            collection = None
        if collection is None:
            self.connection.create(self._name, described)
        else:
            self.connection.patiently(lambda: collection.modify(metadata=described))
        self.copy_manifest(manifest)

    def copy_manifest(self, manifest: Manifest) -> None:
        """Bring the copy in the state folder up to date, for those who look while there is no server."""
        path = self._settings.state / FILE
        if read_manifest(path) != manifest:
            write_manifest(path, manifest)

    def _delete(self, identifiers: Iterable[str], tasks: Iterable[str]) -> None:
        manifest, version = self.manifest(), self.current()
        if manifest is not None and version is not None:
            version.delete(identifiers)
            self._recount(manifest, version, tasks)

    def _recount(self, manifest: Manifest, version: Version, tasks: Iterable[str]) -> None:
        counts = {task: sum(map(copies_of, chain.from_iterable(version.identifiers(task)))) for task in tasks}
        rows = {task: count for task, count in sorted((dict(manifest.rows) | counts).items()) if count}
        corpora = {task: digest for task, digest in manifest.corpora.items() if task in rows}
        self.publish(replace(manifest, changes=manifest.changes + 1, rows=rows, corpora=corpora))

    def _searching(self, question: Callable[[Version], Answer]) -> Answer:
        """Ask the version that is searched; where it is deleted meanwhile, the one that took its place."""
        while True:
            version = self.current()
            if version is None:
                raise self._missing()
            try:
                return question(version)
            except (Gone, Refused):
                # A search that was under way while its version was deleted fails in more than one way.
                found = self.version(version.number)
                if found is not None and found.identity == version.identity:
                    raise
                self._seen = None

    def _missing(self) -> IndexMismatch:
        return IndexMismatch(f"the index {self._name!r} at {self.place} is empty", "Run: lorafleet embed")

    def _name_of(self, number: int | str) -> str:
        return f"{self._name}-v{number}"


def open_index(settings: Settings, prompts: str) -> CorpusIndex:
    """The index, to be searched: over HTTP, or straight from its folder where no server of this machine runs.

    Args:
        prompts: as `lorafleet.tasks.prompt_version` gives it.

    Raises:
        IndexUnavailable: no server answers, and there is no folder to open.
        IndexMismatch: there is nothing in it, or another encoder or other prompts made it.
    """
    index = CorpusIndex(connected_for_reading(settings), settings, prompts)
    index.check()
    index.check_filled()
    return index


def open_for_writing(settings: Settings, prompts: str) -> CorpusIndex:
    """The index on its server, to be written to; it may be missing yet, and who made it is not checked.

    Raises:
        IndexUnavailable: no server answers.
    """
    return CorpusIndex(connected(settings), settings, prompts)
