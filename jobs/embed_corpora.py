"""Corpora to index: the rows that are missing are embedded by a pool of encoders (Ray Data) and written to Chroma.

    python -m jobs.embed_corpora --config configs/laptop.yaml
    ray job submit --working-dir . -- python -m jobs.embed_corpora --config configs/fleet.yaml

Run again, it embeds only what is new or changed, deletes what is gone, and says what it skipped.
"""

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import transformers.utils.logging
import typer
from rich.console import Console
from rich.table import Table

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
from lorafleet.config import Index, Models, Settings
from lorafleet.errors import IndexMismatch, LoRAFleetError, TaskError
from lorafleet.models import fingerprint
from lorafleet.progress import progress
from lorafleet.retrieval import (
    CorpusIndex,
    Encoder,
    Entry,
    Manifest,
    open_for_writing,
    read_manifest,
    row_identifiers,
    server,
    write_manifest,
)
from lorafleet.tasks import BadRow, Corpus, load_catalogue, load_corpus

ROWS_PER_BLOCK = 128


@dataclass(frozen=True)
class EmbedReport:
    """What a run did.

    Attributes:
        rows: how many rows each task has in the index now.
        written: how many of them were embedded and written by this run.
        skipped: how many were there already.
        deleted: how many rows of each task went, because they are gone from its corpus.
        bad_rows: the rows that could not be used, by task.
        strangers: rows of tasks that the catalogue does not have; they were left alone.
        server_started: whether this run started the Chroma server, which goes on running.
        seconds: how long it took.
    """

    rows: Mapping[str, int]
    written: Mapping[str, int]
    skipped: Mapping[str, int]
    deleted: Mapping[str, int]
    bad_rows: Mapping[str, tuple[BadRow, ...]]
    strangers: Mapping[str, int]
    server_started: bool
    seconds: float


def embed_corpora(settings: Settings, rebuild: bool = False) -> EmbedReport:
    """Bring the index in step with the corpora of the tasks that are trained.

    Args:
        rebuild: embed every row again. Without `tasks.names`, or where another encoder made the index, all of it is dropped
            first.

    Raises:
        TaskError: a corpus cannot be read, or no task is left.
        IndexUnavailable: Chroma cannot be reached, or was away too long; what was written stays.
        IndexMismatch: another encoder, or other graph settings, made the index, and `rebuild` is not set.
        ModelError: the encoder cannot be loaded.
    """
    began = time.monotonic()
    catalogue = load_catalogue(settings.tasks)
    corpora = [load_corpus(task, "train", settings.tasks) for task in catalogue.trained]
    if not corpora:
        raise TaskError(f"none of tasks.names = {settings.tasks.names} is trained", "'lorafleet tasks' lists those that are")
    # A cluster's server is its own: only a server of this machine is started from here.
    started = server.on_this_machine(settings.index.url) and server.start(settings)
    index = open_for_writing(settings)
    anew = _anew(index, settings, rebuild)

    missing: list[Entry] = []
    gone: dict[str, set[str]] = {}
    for corpus in corpora:
        entries = _entries(corpus)
        indexed = set() if anew else index.identifiers(corpus.task.name)
        gone[corpus.task.name] = indexed - {entry.identifier for entry in entries}
        missing += [entry for entry in entries if rebuild or entry.identifier not in indexed]
    if missing:
        _embed(missing, index, settings, anew)
    for identifiers in gone.values():
        index.delete(identifiers)

    rows = index.counts()
    _write_manifest(settings, corpora, rows)
    written = Counter(entry.task for entry in missing)
    names = [corpus.task.name for corpus in corpora]
    known = set(names) if settings.tasks.names is None else set(rows)
    return EmbedReport(
        rows={name: rows.get(name, 0) for name in names},
        written={name: written[name] for name in names},
        skipped={name: rows.get(name, 0) - written[name] for name in names},
        deleted={name: len(gone[name]) for name in names},
        bad_rows={corpus.task.name: corpus.bad_rows for corpus in corpora},
        strangers={name: count for name, count in rows.items() if name not in known},
        server_started=started,
        seconds=time.monotonic() - began,
    )


def _anew(index: CorpusIndex, settings: Settings, rebuild: bool) -> bool:
    """Whether the whole index has to go first."""
    try:
        index.check_encoder()
        index.check_graph()
    except IndexMismatch:
        if not rebuild:
            raise
        return True
    return rebuild and settings.tasks.names is None


def _entries(corpus: Corpus) -> list[Entry]:
    keys = [example.key for example in corpus.examples]
    identifiers = row_identifiers(corpus.task.name, keys)
    return [Entry(identifier, corpus.task.name, key) for identifier, key in zip(identifiers, keys, strict=True)]


def _embed(missing: list[Entry], index: CorpusIndex, settings: Settings, anew: bool) -> None:
    """Embed rows on the cluster and write them.

    Only this driver talks to Chroma: one writer keeps batches whole (Chroma takes one at a time anyway), needs neither the
    server's token nor a way to it on the workers, and what it has written is never written again by a task that Ray retries.
    """
    # Longest first: rows of a batch are then alike in length, and the last ones to arrive are the quickest.
    ordered = sorted(missing, key=lambda entry: len(entry.text), reverse=True)
    waiting: list[Entry] = []
    vectors: list[npt.NDArray[np.float32]] = []

    def write() -> None:
        nonlocal anew
        if waiting:
            if anew:
                # Not before there is something to put in its place: an encoder that fails to load costs no index.
                index.drop()
                anew = False
            index.write(waiting, np.concatenate(vectors))
            waiting.clear()
            vectors.clear()

    with progress("rows embedded", len(ordered)) as bar:
        for numbers, embeddings in _encoded([entry.text for entry in ordered], settings.models, settings.index):
            waiting += [ordered[number] for number in numbers]
            vectors.append(embeddings)
            if len(waiting) >= settings.index.write_batch:
                write()
            bar.advance(len(numbers), ordered[numbers[-1]].task)
        write()


def _encoded(texts: Sequence[str], models: Models, index: Index) -> Iterator[tuple[list[int], npt.NDArray[np.float32]]]:
    """Embed texts with Ray Data; yields positions in `texts` and float32 [positions, dimensions], in any order."""
    import pyarrow
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.exceptions import RayError

    from jobs.cluster import cause_of, connect

    # Loaded here first: an encoder that cannot be is one clear error now, and pages of every worker's later.
    Encoder(models)
    connect()
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    blocks = [
        pyarrow.table({"number": list(range(first, first + len(part))), "text": part})
        for first in range(0, len(texts), ROWS_PER_BLOCK)
        if (part := list(texts[first : first + ROWS_PER_BLOCK]))
    ]
    encoders = _pool_size(index, ray.available_resources(), len(blocks))
    embedded = ray.data.from_arrow(blocks).map_batches(
        _EncodeBlock,
        fn_constructor_args=(models, index.encode_batch),
        batch_size=ROWS_PER_BLOCK,
        batch_format="numpy",
        compute=ActorPoolStrategy(min_size=1, max_size=encoders, initial_size=encoders),
        num_cpus=1,
        num_gpus=index.gpus_per_encoder or None,
    )
    try:
        for block in embedded.iter_batches(batch_size=None, batch_format="numpy"):
            yield [int(number) for number in block["number"]], block["embedding"]
    except RayError as error:
        cause = cause_of(error)
        if isinstance(cause, LoRAFleetError):
            raise cause from None
        last_line = str(error).strip().splitlines()[-1:]
        raise LoRAFleetError(
            f"an encoder failed: {''.join(last_line) or type(error).__name__}",
            "Run again: it embeds what is missing",
        ) from error


def _pool_size(index: Index, free: Mapping[str, float], blocks: int) -> int:
    """How many encoders there shall be.

    Without `index.encoders` one for every GPU share, or for every CPU, that nobody uses now. An encoder has one CPU, and Ray
    holds it to one thread: threads of one encoder wait for each other at every layer, encoders never do.
    """
    if index.encoders is not None:
        wanted = index.encoders
    elif index.gpus_per_encoder:
        wanted = int(free.get("GPU", 0) / index.gpus_per_encoder)
    else:
        wanted = int(free.get("CPU", 0))
    return max(1, min(wanted, blocks))


class _EncodeBlock:
    """An encoder in an actor of the pool."""

    def __init__(self, models: Models, batch: int) -> None:
        # A bar for every worker's weights would drown the job's own.
        transformers.utils.logging.disable_progress_bar()
        self._encoder = Encoder(models)
        self._batch = batch

    def __call__(self, block: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        return {"number": block["number"], "embedding": self._encoder.encode(block["text"].tolist(), self._batch)}


def _write_manifest(settings: Settings, corpora: Sequence[Corpus], rows: Mapping[str, int]) -> None:
    path = settings.state / "index.json"
    encoder = fingerprint(settings.models.encoder, settings.models.encoder_revision)
    before = read_manifest(path)
    older = before.corpora if before is not None and before.fingerprint == encoder else {}
    corpora_now = older | {corpus.task.name: corpus.fingerprint for corpus in corpora}
    manifest = Manifest(
        encoder=settings.models.encoder,
        fingerprint=encoder,
        url=settings.index.url,
        collection=settings.index.collection,
        rows=dict(rows),
        corpora={name: corpora_now[name] for name in sorted(corpora_now) if name in rows},
    )
    if manifest != before:
        write_manifest(path, manifest)


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
