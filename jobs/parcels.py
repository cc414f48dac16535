"""The rows to embed, in parcels: read from their sources as they are needed, and never held all at once.

Which rows share a parcel follows from the corpora and the index alone, so a run that was killed and run again gives every
row the vector that it would have had: a vector's last bits depend on the rows that it is embedded with.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from jobs.ledger import Ledger
from lorafleet.config import Settings
from lorafleet.errors import TaskError
from lorafleet.retrieval import Entry, open_for_writing, text_digest
from lorafleet.tasks import CorpusRows, Task, formless, texts_to_embed

ROWS_PER_PARCEL = 128
# Rows of like length are embedded together, or the encoder would work on padding.
ROWS_SORTED_AT_ONCE = 8192
Item = TypeVar("Item")


@dataclass(frozen=True)
class Row:
    """A row to embed.

    Attributes:
        texts: what its vector is the mean of.
        built: whether the next version has it already.
    """

    entry: Entry
    texts: tuple[str, ...]
    built: bool = False


@dataclass(frozen=True)
class Reading:
    """What is read, and by which ledger; it can be sent to a process of the same machine.

    Attributes:
        tasks: whose corpora are read, in this order.
        ledger: the ledger's file.
        searched: the number of the version that is searched, for the rows whose text is nowhere else.
        prompts: the version of the prompts.
    """

    settings: Settings
    tasks: tuple[Task, ...]
    ledger: Path
    searched: int
    prompts: str

    def parcels(self) -> Iterator[list[Row]]:
        """The parcels, longest rows first in every few thousand; those that the next version has whole are left out.

        Raises:
            TaskError: a corpus cannot be read, or has changed since its rows were noted.
            IndexUnavailable: Chroma was away for too long.
        """
        ledger = Ledger(self.ledger)
        try:
            for task in self.tasks:
                yield from _parcels(self._wanted(task, ledger))
            yield from _parcels(self._others(ledger))
        finally:
            ledger.close()

    def _wanted(self, task: Task, ledger: Ledger) -> Iterator[Row]:
        rows, index = CorpusRows(task, "train", self.settings.tasks), self.settings.index
        missing = ledger.missing(task.name)
        place, identifier, built = next(missing, (-1, "", False))
        if place < 0:
            return
        for number, example in enumerate(rows):
            if number == place:
                texts = texts_to_embed(task, example, index)
                if text_digest(texts) not in identifier:
                    break
                yield Row(Entry(identifier, task.name, example.key), texts, built)
                place, identifier, built = next(missing, (-1, "", False))
                if place < 0:
                    return
        raise TaskError(f"the rows of task {task.name} in {rows.source} changed while they were read", "Run again")

    def _others(self, ledger: Ledger) -> Iterator[Row]:
        """Rows without a corpus: one text of each is in the index that another encoder made."""
        for page in _chunks(ledger.others_missing(), ROWS_SORTED_AT_ONCE):
            built = dict(page)
            version = open_for_writing(self.settings, self.prompts).version(self.searched)
            for rows in version.read(list(built)) if version else ():
                for entry in sorted(rows.entries, key=lambda entry: entry.identifier):
                    yield Row(entry, formless(entry.text, self.settings.index), built[entry.identifier])


def _parcels(rows: Iterable[Row]) -> Iterator[list[Row]]:
    for window in _chunks(rows, ROWS_SORTED_AT_ONCE):
        window.sort(key=lambda row: len(row.entry.text), reverse=True)
        for parcel in _chunks(window, ROWS_PER_PARCEL):
            if not all(row.built for row in parcel):
                yield parcel


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    chunk: list[Item] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
