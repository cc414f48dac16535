"""The rows of a task's split as examples: from the hub, a folder laid out like it, the user's files, or the sample pack."""

import hashlib
import os
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lorafleet.config import Tasks
from lorafleet.errors import TaskError, TooManyBadRows
from lorafleet.tasks.files import read_rows
from lorafleet.tasks.task import Declared, Example, Split, Task
from lorafleet.tasks.values import BadRowError, NumberedRow

SAMPLES = Path(__file__).with_name("samples")


@dataclass(frozen=True)
class BadRow:
    """A row that was skipped, and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Corpus:
    """Examples that an adapter can be trained on.

    Attributes:
        name: of their task, or what the adapter of several tasks together is called.
        family: of their task; "all" for several tasks together.
        examples: in an order that depends on the seed alone.
        bad_rows: the rows that were skipped.
        source: where the rows come from, for people.
    """

    name: str
    family: str
    examples: tuple[Example, ...]
    bad_rows: tuple[BadRow, ...]
    source: str

    @cached_property
    def fingerprint(self) -> str:
        """A digest of every key and answer: two corpora with the same one train the same adapter."""
        digest = hashlib.sha256()
        for example in self.examples:
            for part in (example.prompt, *example.answers, *example.options):
                digest.update(part.encode() + b"\0")
            digest.update(b"\1")
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class TaskCorpus(Corpus):
    """The examples of one split of a task, at most `tasks.rows_per_task`."""

    task: Task
    split: Split


class CorpusRows:
    """The usable rows of a split, one after the other in the order of their source; read anew by every `iter`.

    Attributes:
        bad_rows: the rows that the last reading skipped.
        source: where the rows come from, for people.

    Raises:
        TaskError: (also while rows are read) the source has no such split, or cannot be read.
        TooManyBadRows: (while rows are read) more damaged rows than `bad_row_limit`; the message names the first.
    """

    def __init__(self, task: Task, split: Split, settings: Tasks) -> None:
        self.task, self.split = task, split
        self.bad_rows: list[BadRow] = []
        self._settings = settings
        self._declared: Declared = "evaluation" if split == "evaluation" else "train"
        self._paths = _files(task, self._declared, settings)
        if self._paths is None:
            self.source = f"hub:{task.hub}/{task.config}/{task.splits[self._declared]}"
        elif SAMPLES in self._paths[0].parents:
            self.source = "sample pack"
        else:
            self.source = ", ".join(_tidy(file) for file in self._paths)

    def __iter__(self) -> Iterator[Example]:
        self.bad_rows.clear()
        for name, (line, row) in self._numbered():
            try:
                if isinstance(row, BadRowError):
                    raise row
                example = self.task.render(row)
            except BadRowError as error:
                self._note(BadRow(name, line, str(error)))
            else:
                yield example

    def chosen(self, count: int) -> Sequence[int]:
        """Which of the usable rows make the corpus, by their places, in its order; 4 bytes a row.

        Args:
            count: how many usable rows there are.
        """
        most = self._settings.rows_per_task
        places = array("I", range(count))
        random.Random(f"{self._settings.seed}-{self.task.name}-{self._declared}").shuffle(places)
        if self.split == "evaluation":
            return places[:most]
        trained = min(most, count - int(count * self._settings.validation_share))
        return places[:trained] if self.split == "train" else places[trained : trained + most]

    def none_usable(self) -> TaskError:
        """The error for a source whose rows are all bad, or that has none."""
        problem = f"task {self.task.name} has no usable row in {self.source}"
        if not self.bad_rows:
            return TaskError(f"{problem}: it is empty")
        return TaskError(f"{problem}: of {len(self.bad_rows)} bad rows, the first is {self.bad_rows[0]}")

    def _numbered(self) -> Iterator[tuple[str, NumberedRow]]:
        if self._paths is None:
            return ((self.source, row) for row in _hub_rows(self.task, self._declared))
        return ((_tidy(file), row) for file in self._paths for row in read_rows(file, self.task.columns))

    def _note(self, bad: BadRow) -> None:
        self.bad_rows.append(bad)
        limit = self._settings.bad_row_limit
        if len(self.bad_rows) > limit:
            raise TooManyBadRows(
                f"task {self.task.name}: more than tasks.bad_row_limit = {limit} bad rows, first {self.bad_rows[0]}",
                "Mend the rows, or raise the limit",
            ) from None


def load_corpus(task: Task, split: Split, settings: Tasks) -> TaskCorpus:
    """Read and render the rows of a split; with more than `rows_per_task`, a seeded sample of them.

    The validation split may be empty. No row of it has the key of a training row: that one would be found for it.

    Raises:
        TaskError: the source has no such split, cannot be read, or holds no usable row.
        TooManyBadRows: more damaged rows than `bad_row_limit`; the message names the first.
    """
    rows = CorpusRows(task, split, settings)
    examples = list(rows)
    if not examples:
        raise rows.none_usable()
    chosen = tuple(examples[place] for place in rows.chosen(len(examples)))
    if split == "validation":
        trained = CorpusRows(task, "train", settings).chosen(len(examples))
        known = {examples[place].key for place in trained}
        chosen = tuple(example for example in chosen if example.key not in known)
    return TaskCorpus(task.name, task.family, chosen, tuple(rows.bad_rows), rows.source, task, split)


def joined(name: str, corpora: Sequence[Corpus], seed: int) -> Corpus:
    """The examples of several tasks as one corpus, for one adapter that is trained on everything."""
    examples = [example for corpus in corpora for example in corpus.examples]
    random.Random(f"{seed}-{name}").shuffle(examples)
    bad_rows = tuple(row for corpus in corpora for row in corpus.bad_rows)
    sources = dict.fromkeys(corpus.source for corpus in corpora)
    return Corpus(name, "all", tuple(examples), bad_rows, f"{len(corpora)} tasks: {', '.join(sources)}")


def _files(task: Task, split: Declared, settings: Tasks) -> list[Path] | None:
    """The files that hold a split; None where the rows come from the hub itself."""
    if split not in (task.splits if task.hub else task.files):
        raise TaskError(f"task {task.name} declares no {split} split")
    if task.files:
        return [task.files[split]]
    if settings.hub_root is not None:
        return _hub_folder_files(task, split, settings.hub_root)
    if settings.source == "samples":
        file = SAMPLES / task.name / f"{split}.jsonl"
        if not file.is_file():
            raise TaskError(
                f"the sample pack has no {split} rows for task {task.name}", "Set tasks.source or tasks.hub_root"
            )
        return [file]
    return None


def _hub_folder_files(task: Task, split: Declared, hub_root: Path) -> list[Path]:
    """Resolve a split's files by the README of a folder laid out like a hub repository, as `load_dataset` does."""
    assert task.hub is not None
    folder = hub_root / task.hub
    if not folder.is_dir():
        raise TaskError(f"tasks.hub_root = {hub_root} has no folder {task.hub}")
    from datasets import load_dataset_builder

    try:
        data_files = load_dataset_builder(str(folder), task.config).config.data_files
    # A README of the folder's own, and so errors of many kinds.
    except Exception as error:
        raise TaskError(f"cannot read {folder}: {' '.join(str(error).split())}") from None
    name = task.splits[split]
    if not data_files or name not in data_files:
        raise TaskError(f"{folder} has no split {name!r} in configuration {task.config!r}")
    return [Path(file) for file in data_files[name]]


def _hub_rows(task: Task, split: Declared) -> Iterator[NumberedRow]:
    from datasets import load_dataset

    number = 0
    try:
        dataset = load_dataset(task.hub, task.config, split=task.splits[split])
        for row in dataset.select_columns([name for name in dataset.column_names if name in task.columns]):
            number += 1
            yield number, row
    except Exception as error:
        where = f"row {number + 1} of {task.hub}" if number else str(task.hub)
        raise TaskError(
            f"cannot read {where} from the hub: {error}", "Check the network, or set tasks.hub_root to a folder"
        ) from None


def _tidy(file: Path) -> str:
    """A file's path as people write it: relative to here where it lies below."""
    return os.path.relpath(file) if file.resolve().is_relative_to(Path.cwd()) else str(file)
