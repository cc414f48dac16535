"""Corpora to index: the rows that are missing are embedded by a pool of encoders (Ray Data) and written to Chroma.

    python -m jobs.embed_corpora --config configs/laptop.yaml
    ray job submit --working-dir . -- python -m jobs.embed_corpora --config configs/fleet.yaml

Run again, it embeds only what is new or changed, leaves out what is gone, and says what it skipped. The index that is
searched is never touched: the next version is filled beside it and takes its place in one step. A run that was killed is
taken up by the next one.
"""

import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from jobs.ledger import Ledger
from jobs.parcels import Reading
from lorafleet.cli.options import (
    ConfigOption,
    HubRootOption,
    SetOption,
    SourceOption,
    StateOption,
    TasksOption,
    settings_from,
)
from lorafleet.cli.running import run
from lorafleet.config import Settings
from lorafleet.errors import IndexMismatch, TaskError
from lorafleet.placing import places_of
from lorafleet.progress import progress
from lorafleet.retrieval import (
    CorpusIndex,
    Encoder,
    Entry,
    Manifest,
    NextVersion,
    Vectors,
    Version,
    copies_of,
    indexing,
    open_for_writing,
    server,
    sweep,
)
from lorafleet.storage import check_state_writable
from lorafleet.tasks import BadRow, CorpusRows, Task, load_catalogue, prompt_version
from lorafleet.weighing import LEARNED

FOLDER = ".embed"


@dataclass(frozen=True)
class EmbedReport:
    """What a run did.

    Attributes:
        rows: how many rows each task has in the index now.
        written: how many of them were embedded and written by this run.
        skipped: how many were there already.
        deleted: how many rows of each task went, because they are gone from its corpus. Where the number of rows with a text
            changes, all of them are deleted and written.
        bad_rows: the rows that could not be used, by task.
        strangers: rows of tasks that the catalogue does not have; they were left alone.
        added: rows that came in with adapters; they were left alone, and so were corpora of those tasks.
        version: the version of the index that is searched now.
        switched: whether that is a new one.
        server_started: whether this run started the Chroma server, which goes on running.
        rows_per_second: how quickly texts were embedded and written, from the first that came; 0 where none were.
        seconds: how long it took.
    """

    rows: Mapping[str, int]
    written: Mapping[str, int]
    skipped: Mapping[str, int]
    deleted: Mapping[str, int]
    bad_rows: Mapping[str, tuple[BadRow, ...]]
    strangers: Mapping[str, int]
    added: Mapping[str, int]
    version: int
    switched: bool
    server_started: bool
    rows_per_second: float
    seconds: float


@dataclass(frozen=True)
class Searched:
    """The index as a run finds it.

    Attributes:
        manifest: None where there is no index, or one that nothing can be taken from.
        version: its rows.
        other_encoder: whether none of its vectors can stay.
    """

    manifest: Manifest | None = None
    version: Version | None = None
    other_encoder: bool = False

    @property
    def number(self) -> int:
        """Of the version; 0 where there is none."""
        return self.manifest.version if self.manifest else 0

    @property
    def added(self) -> Mapping[str, int]:
        """The rows that came in with adapters, by task."""
        return self.manifest.added if self.manifest else {}


@dataclass(frozen=True)
class Work:
    """What was embedded: rows of each task, and how quickly."""

    written: Counter[str] = field(default_factory=Counter)
    rows_per_second: float = 0.0


def embed_corpora(settings: Settings, rebuild: bool = False) -> EmbedReport:
    """Bring the index in step with the corpora of the tasks that are trained.

    Args:
        rebuild: embed every row of these tasks again. Where another encoder made the index, those of other tasks, too;
            without `tasks.names`, tasks that the catalogue does not have any more are left out.

    Raises:
        TaskError: a corpus cannot be read, or no task is left.
        IndexUnavailable: Chroma cannot be reached, or was away too long (the next run takes up what was written), or another
            run is under way.
        IndexMismatch: another encoder or other prompts made the index, and `rebuild` is not set, or `tasks.names` leaves out
            corpora whose rows have to be rendered for it again.
        ModelError: the encoder cannot be loaded.
        SettingsError: nothing can be written to the state folder.
    """
    began = time.monotonic()
    tasks = load_catalogue(settings.tasks).trained
    if not tasks:
        raise TaskError(f"none of tasks.names = {settings.tasks.names} is trained", "'lorafleet tasks' lists those that are")
    check_state_writable(settings.state)
    with indexing(settings.state), _ledger(settings.state / FOLDER) as (ledger, path):
        bad_rows = {task.name: _note_corpus(task, settings, ledger) for task in tasks}
        # A cluster's server is its own: only a server of this machine is started from here.
        started = server.on_this_machine(settings.index.url) and server.start(settings)
        index = open_for_writing(settings, prompt_version())
        searched = _searched(index, settings, rebuild)
        corpora = tuple(task for task in tasks if task.name not in searched.added)
        for task in tasks:
            if task.name in searched.added:
                ledger.forget(task.name)
        left_out = _note_indexed(searched, corpora, ledger, rebuild and settings.tasks.names is None)
        ledger.note_aim(rebuild, searched.other_encoder)
        names = [task.name for task in corpora]
        deleted = {name: ledger.gone(name) for name in names}
        stale = rebuild or left_out or any(deleted.values()) or any(ledger.to_embed(name) for name in names)
        if searched.manifest is None or searched.version is None or stale or not searched.version.graph_fits:
            reading = Reading(settings, corpora, path, searched.number, prompt_version())
            manifest, work = _build(index, searched, ledger, reading, rebuild)
        else:
            searched.version.set_search_breadth()
            sweep(index, searched.number)
            index.copy_manifest(searched.manifest)
            manifest, work = searched.manifest, Work()
        if settings.weighing.weigher in LEARNED:
            # Who serves would have to do it before the first answer.
            with progress("learning where the tasks lie", 1) as bar:
                places_of(index, settings.state)
                bar.advance(1)
    written = work.written
    known = set(names) if settings.tasks.names is None else set(manifest.rows)
    return EmbedReport(
        rows={name: manifest.rows.get(name, 0) for name in names},
        written={name: written[name] for name in names},
        skipped={name: manifest.rows.get(name, 0) - written[name] for name in names},
        deleted=deleted,
        bad_rows=bad_rows,
        strangers={name: manifest.rows[name] for name in manifest.corpora if name not in known},
        added=manifest.added,
        version=manifest.version,
        switched=manifest.version != searched.number,
        server_started=started,
        rows_per_second=work.rows_per_second,
        seconds=time.monotonic() - began,
    )


@contextmanager
def _ledger(folder: Path) -> Iterator[tuple[Ledger, Path]]:
    """A ledger in an empty folder; one that a killed run has left goes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ledger = Ledger(folder / "ledger.sqlite", writable=True)
    try:
        yield ledger, folder / "ledger.sqlite"
    finally:
        ledger.close()
        shutil.rmtree(folder, ignore_errors=True)


def _note_corpus(task: Task, settings: Settings, ledger: Ledger) -> tuple[BadRow, ...]:
    rows = CorpusRows(task, "train", settings.tasks)
    ledger.note_corpus(rows, settings.index)
    return tuple(rows.bad_rows)


def _searched(index: CorpusIndex, settings: Settings, rebuild: bool) -> Searched:
    """What there is, as far as this run can use it."""
    try:
        manifest = index.manifest()
    except IndexMismatch:
        if not rebuild:
            raise
        return Searched()
    if manifest is None:
        return Searched()
    try:
        manifest.check(index.encoder, index.prompts)
    except IndexMismatch:
        if not rebuild:
            raise
        names = settings.tasks.names
        if manifest.prompts != index.prompts and names is not None:
            raise IndexMismatch(
                f"the index has prompt version {manifest.prompts}, not {index.prompts}, and only some tasks are named",
                "Embed all of them again with: lorafleet embed --rebuild",
            ) from None
        # Of a corpus that is not read there are the keys alone, and of other forms nothing.
        others = sorted(set(manifest.corpora).difference(names or manifest.corpora))
        if others and set(settings.index.forms) != {"instruction"}:
            raise IndexMismatch(
                f"another encoder than models.encoder = {settings.models.encoder} made the index, and of its tasks "
                f"{', '.join(others)} are not named: their forms (index.forms) are not in it",
                "Embed all of them again, without --tasks: lorafleet embed --rebuild",
            ) from None
    return Searched(manifest, index.version(manifest.version), manifest.fingerprint != index.encoder)


def _note_indexed(searched: Searched, corpora: Sequence[Task], ledger: Ledger, only_known: bool) -> bool:
    """Note the rows that there are, and say whether some are left out: of tasks that nobody declares any more."""
    if searched.manifest is None or searched.version is None:
        return False
    names = frozenset(task.name for task in corpora)
    dropped = set(searched.manifest.corpora) - names if only_known else set()
    for task in searched.manifest.rows:
        if task not in dropped:
            for page in searched.version.identifiers(task):
                ledger.note_indexed(page, names)
    return bool(dropped)


def _build(index: CorpusIndex, searched: Searched, ledger: Ledger, reading: Reading, rebuild: bool) -> tuple[Manifest, Work]:
    """Fill the next version and let it be searched."""
    names = [task.name for task in reading.tasks]
    to_embed = sum(ledger.to_embed(name) for name in names) + ledger.others_to_embed()
    if to_embed:
        # Loaded here first: an encoder that cannot be is one clear error now, and pages of every worker's later.
        Encoder(reading.settings.models)
    version = NextVersion(index, searched.number, rebuild or searched.other_encoder)
    for page in version.version.identifiers():
        ledger.note_built(page)
    for page in ledger.unwanted():
        version.version.delete(page)
    _copy(version, searched, ledger)
    # Counted anew: what a run before has embedded is there.
    to_embed = sum(ledger.to_embed(name) for name in names) + ledger.others_to_embed()
    work = _embed(version, reading, to_embed) if to_embed else Work()
    rows, expected = version.version.counts(), ledger.rows()
    short = [f"{name} {rows.get(name, 0)} of {expected[name]}" for name in names if rows.get(name) != expected[name]]
    if short:
        raise IndexMismatch(f"rows of the next version went while it was filled: {', '.join(short)}", "Run again")
    digests = dict(searched.manifest.corpora) if searched.manifest else {}
    digests |= {name: ledger.fingerprint(name) for name in names}
    with index.changing():
        latest = _catch_up(index, searched, version, names)
        rows |= latest
        manifest = replace(
            index.plan(version.version.number),
            rows={task: count for task, count in sorted(rows.items()) if count},
            corpora={task: digests[task] for task in sorted(digests) if task in rows and task not in latest},
        )
        version.switch(manifest)
    version.delete_others()
    return manifest, work


def _copy(version: NextVersion, searched: Searched, ledger: Ledger) -> None:
    """Bring the rows that stay into the next version, with the vectors that they have."""
    if searched.version is not None and (count := ledger.to_keep()):
        with progress("rows copied", count) as bar:
            for page in ledger.kept():
                for copied in version.copy(page, searched.version):
                    bar.advance(copied)


def _embed(version: NextVersion, reading: Reading, to_embed: int) -> Work:
    """Embed rows on the cluster and write them.

    Only this driver writes: one writer keeps batches whole (Chroma takes one at a time anyway), needs neither the server's
    token nor a way to it on the workers, and what it has written is never written again by a task that Ray retries.
    """
    from jobs.encoding import embedded

    written: Counter[str] = Counter()
    waiting: list[Entry] = []
    vectors: list[Vectors] = []

    def write() -> None:
        if waiting:
            version.write(waiting, np.concatenate(vectors))
            waiting.clear()
            vectors.clear()

    began, first, embedded_texts = 0.0, 0, 0
    with progress("rows embedded", to_embed) as bar:
        for parcel in embedded(reading, to_embed):
            began, first = (began, first) if began else (time.monotonic(), len(parcel.entries))
            waiting += parcel.entries
            vectors.append(parcel.vectors)
            for entry in parcel.entries:
                written[entry.task] += copies_of(entry.identifier)
            embedded_texts += len(parcel.entries)
            if len(waiting) >= reading.settings.index.write_batch:
                write()
            bar.advance(len(parcel.entries), parcel.entries[-1].task)
        write()
    return Work(written, (embedded_texts - first) / max(time.monotonic() - began, 1e-9))


def _catch_up(index: CorpusIndex, searched: Searched, version: NextVersion, names: Sequence[str]) -> dict[str, int]:
    """Bring into the next version what adapters have brought to the searched one, or taken from it, since this run began.

    Returns:
        how many rows of adapters each task has now, where that has changed; such a task has no corpus.
    """
    if searched.manifest is None or searched.version is None or searched.other_encoder:
        return {}
    latest = index.manifest()
    if latest is None or latest == searched.manifest:
        return {}
    counts = {}
    gone = set(searched.manifest.rows) - set(latest.rows) - set(names)
    for task in sorted(gone | set(latest.added)):
        there = {identifier for page in version.version.identifiers(task) for identifier in page}
        wanted = {identifier for page in searched.version.identifiers(task) for identifier in page}
        version.version.delete(there - wanted)
        for _ in version.copy(sorted(wanted - there), searched.version):
            pass
        counts[task] = sum(map(copies_of, wanted))
    return counts


def print_report(report: EmbedReport, settings: Settings) -> None:
    """The bad rows on standard error, and a table of what was done on standard output."""
    for rows in report.bad_rows.values():
        for row in rows:
            print(f"skipped a bad row: {row}", file=sys.stderr)
    columns: dict[str, Callable[[str], int]] = {
        "rows": lambda task: report.rows[task],
        "written": lambda task: report.written[task],
        "skipped": lambda task: report.skipped[task],
        "deleted": lambda task: report.deleted[task],
        "bad": lambda task: len(report.bad_rows[task]),
    }
    table = Table("task")
    for title in columns:
        table.add_column(title, justify="right")
    for task in report.rows:
        table.add_row(task, *(str(count(task)) for count in columns.values()))
    table.add_section()
    table.add_row("all", *(str(sum(count(task) for task in report.rows)) for count in columns.values()))
    console = Console()
    console.print(table)
    written, skipped = sum(report.written.values()), sum(report.skipped.values())
    lines = [f"{written} rows embedded and written, {skipped} skipped as they were there already, {report.seconds:.1f} s"]
    lines.append(f"version {report.version} of the index is searched{' from now on' if report.switched else ', as before'}")
    if report.added:
        named = ", ".join(f"{task} ({count})" for task, count in report.added.items())
        lines.append(f"left alone, as they came in with adapters: {named}")
    if report.strangers:
        named = ", ".join(f"{task} ({count})" for task, count in report.strangers.items())
        lines.append(f"left alone, as the catalogue has no such task: {named}; --rebuild drops them")
    if report.server_started:
        lines.append(f"the Chroma server goes on running at {settings.index.url}; end it with: lorafleet down")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def main(
    config: ConfigOption = None,
    overrides: SetOption = [],
    state: StateOption = None,
    hub_root: HubRootOption = None,
    source: SourceOption = None,
    tasks: TasksOption = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Embed every row again, into a new index.")] = False,
) -> None:
    """Embed the corpora and write them to the index; only what is missing or changed."""
    settings = settings_from(config, overrides, state, hub_root, source, tasks)
    print_report(embed_corpora(settings, rebuild), settings)


if __name__ == "__main__":
    run(lambda: typer.run(main))
