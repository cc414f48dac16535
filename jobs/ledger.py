"""Which rows the index should have, which it has, and so what is to be done: identifiers in a file, not in memory.

An identifier stands for all rows of a task with the same text, and counts them: where their number changes, the text is
another one here, and is embedded again.

A row costs some 150 bytes of disk here while a job runs, and none of memory.
"""

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

from lorafleet.config import Index
from lorafleet.retrieval import copies_of, task_of, text_digest
from lorafleet.tasks import CorpusRows, texts_to_embed

CACHE_KIB = 32_768
ROWS_AT_ONCE = 10_000
TABLES = """
CREATE TABLE aim (anew INTEGER, other_encoder INTEGER);
CREATE TABLE usable (place INTEGER PRIMARY KEY, digest TEXT);
CREATE TABLE chosen (place INTEGER PRIMARY KEY);
CREATE TABLE wanted (
    task TEXT, place INTEGER, copies INTEGER, identifier TEXT NOT NULL UNIQUE, PRIMARY KEY (task, place)
) WITHOUT ROWID;
CREATE TABLE indexed (identifier TEXT PRIMARY KEY, task TEXT, copies INTEGER, corpus INTEGER) WITHOUT ROWID;
CREATE TABLE built (identifier TEXT PRIMARY KEY) WITHOUT ROWID;
"""
# Rows with the same text have the place of the first one: they are alike, so any place would do.
CHOOSE = """
INSERT INTO wanted
SELECT :task, min(place), count(*), :task || '-' || digest || '-' || count(*)
FROM usable WHERE :all OR place IN (SELECT place FROM chosen) GROUP BY digest
"""
MISSING = """
SELECT place, identifier, identifier IN (SELECT identifier FROM built) AS built FROM wanted
WHERE task = ? AND ((SELECT anew FROM aim) OR identifier NOT IN (SELECT identifier FROM indexed)) ORDER BY place
"""
OTHERS = """
SELECT identifier, identifier IN (SELECT identifier FROM built) AS built FROM indexed
WHERE NOT corpus AND (SELECT other_encoder FROM aim) ORDER BY identifier
"""
KEPT = """
SELECT identifier FROM indexed
WHERE NOT (SELECT other_encoder FROM aim) AND identifier NOT IN (SELECT identifier FROM built)
AND (NOT corpus OR (NOT (SELECT anew FROM aim) AND identifier IN (SELECT identifier FROM wanted))) ORDER BY identifier
"""
GONE = """
SELECT coalesce(sum(copies), 0) FROM indexed
WHERE task = ? AND corpus AND identifier NOT IN (SELECT identifier FROM wanted)
"""
UNWANTED = """
SELECT identifier FROM built WHERE identifier NOT IN (SELECT identifier FROM wanted)
AND identifier NOT IN (SELECT identifier FROM indexed WHERE NOT corpus)
"""


class Ledger:
    """The identifiers of one run.

    Args:
        path: of the file; with `writable`, one that does not exist yet.
    """

    def __init__(self, path: Path, writable: bool = False) -> None:
        # As a URI, a path keeps its # ? and %: unquoted, SQLite would open another file.
        uri = f"{path.absolute().as_uri()}?mode={'rwc' if writable else 'ro'}"
        self._file = sqlite3.connect(uri, uri=True, isolation_level=None)
        self._file.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        if writable:
            # Nobody needs this file once its process is gone.
            self._file.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + TABLES)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def note_aim(self, anew: bool, other_encoder: bool) -> None:
        """Note, once, what of the index may stay.

        Args:
            anew: rows of the corpora are embedded even where they are indexed.
            other_encoder: no vector stays, as another encoder made them.
        """
        self._insert("aim", 2, [(anew or other_encoder, other_encoder)])

    def note_corpus(self, rows: CorpusRows, index: Index) -> None:
        """Note the rows that a corpus should have in the index.

        Args:
            index: says which form of a row's text is embedded: rows in which that is the same are one text of the index.

        Raises:
            TaskError: it has no usable row, or cannot be read.
        """
        task = rows.task.name
        texts = (texts_to_embed(rows.task, example, index) for example in rows)
        self._insert("usable", 2, enumerate(map(text_digest, texts)))
        count = self._count("usable")
        if not count:
            raise rows.none_usable()
        chosen = rows.chosen(count)
        whole = len(chosen) == count
        if not whole:
            self._insert("chosen", 1, ((place,) for place in chosen))
        self._file.execute(CHOOSE, {"task": task, "all": whole})
        self._file.executescript("DELETE FROM usable; DELETE FROM chosen;")

    def forget(self, task: str) -> None:
        """Want no row of a corpus."""
        self._file.execute("DELETE FROM wanted WHERE task = ?", (task,))

    def note_indexed(self, identifiers: Iterable[str], corpora: frozenset[str]) -> None:
        """Note rows that the index has.

        Args:
            corpora: the tasks whose rows are to be those of their corpora; rows of others stay.
        """
        rows = ((identifier, task_of(identifier), copies_of(identifier)) for identifier in identifiers)
        self._insert("indexed", 4, ((identifier, task, copies, task in corpora) for identifier, task, copies in rows))

    def note_built(self, identifiers: Iterable[str]) -> None:
        """Note rows that the next version has already."""
        self._insert("built", 1, ((identifier,) for identifier in identifiers))

    def fingerprint(self, task: str) -> str:
        """A digest of the rows that a corpus should have in the index, in no order."""
        digest = hashlib.sha256()
        for (identifier,) in self._file.execute("SELECT identifier FROM wanted WHERE task = ? ORDER BY identifier", (task,)):
            digest.update(identifier.encode() + b"\n")
        return digest.hexdigest()[:16]

    def missing(self, task: str) -> Iterator[tuple[int, str, bool]]:
        """Rows of a corpus that are to be embedded: place in the source, identifier, whether the next version has it."""
        for place, identifier, built in self._file.execute(MISSING, (task,)):
            yield place, identifier, bool(built)

    def to_embed(self, task: str) -> int:
        """Count the texts of a corpus that are to be embedded, and are not in the next version."""
        query = f"SELECT count(*) FROM ({MISSING}) WHERE NOT built"
        return self._number(query, (task,))

    def gone(self, task: str) -> int:
        """Count the indexed rows of a task that its corpus no longer has, or has another number of times."""
        return self._number(GONE, (task,))

    def rows(self) -> dict[str, int]:
        """How many rows the index should have of each task."""
        query = (
            "SELECT task, sum(copies) FROM (SELECT task, copies FROM wanted UNION ALL "
            "SELECT task, copies FROM indexed WHERE NOT corpus) GROUP BY task ORDER BY task"
        )
        return dict(self._file.execute(query).fetchall())

    def kept(self) -> Iterator[list[str]]:
        """The rows that stay as they are and that the next version has not yet, some thousands at a time."""
        yield from self._pages(KEPT)

    def to_keep(self) -> int:
        """How many rows stay as they are, and are not in the next version."""
        return self._number(f"SELECT count(*) FROM ({KEPT})")

    def others_missing(self) -> Iterator[tuple[str, bool]]:
        """The rows without a corpus here that are to be embedded again: identifier, whether the next version has it."""
        for identifier, built in self._file.execute(OTHERS):
            yield identifier, bool(built)

    def others_to_embed(self) -> int:
        """How many rows without a corpus here are to be embedded again, and are not in the next version."""
        return self._number(f"SELECT count(*) FROM ({OTHERS}) WHERE NOT built")

    def unwanted(self) -> Iterator[list[str]]:
        """The rows that the next version has and should not have, some thousands at a time."""
        yield from self._pages(UNWANTED)

    def _pages(self, query: str) -> Iterator[list[str]]:
        cursor = self._file.execute(query)
        while page := cursor.fetchmany(ROWS_AT_ONCE):
            yield [identifier for (identifier,) in page]

    def _insert(self, table: str, columns: int, rows: Iterable[tuple[object, ...]]) -> None:
        places = ", ".join("?" * columns)
        self._file.execute("BEGIN")
        self._file.executemany(f"INSERT INTO {table} VALUES ({places})", rows)
        self._file.execute("COMMIT")

    def _count(self, table: str) -> int:
        return self._number(f"SELECT count(*) FROM {table}")

    def _number(self, query: str, values: tuple[object, ...] = ()) -> int:
        (number,) = self._file.execute(query, values).fetchone()
        return int(number)
