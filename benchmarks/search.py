"""The index by its size: how long it takes to fill, what Chroma needs of memory and disk, how soon and how well it answers.

    python -m benchmarks.search                                            34,000 rows of 22 tasks, and 100,000 of 100
    python -m benchmarks.search --rows 34000,1000000 --tasks 22,1000       half an hour on two cores

Rows are drawn, not embedded: what an encoder takes is told by `benchmarks.embed`. Like sentences of one template, those of a
task lie around a middle of its own, all tasks share a direction, and what tells rows apart has a few dozen dimensions, not
384. Queries are drawn as rows are, and are none of them. Recall is the share of the rows nearest to a query, by comparison
with each, that the search finds.
"""

import itertools
import json
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer

from benchmarks.fleet import WORDS
from benchmarks.report import tell
from lorafleet.config import Settings, load_settings
from lorafleet.progress import progress
from lorafleet.retrieval import CorpusIndex, Entry, NextVersion, Vectors, open_for_writing, row_identifiers, server
from lorafleet.tasks import prompt_version

DIMENSIONS, VARIED = 384, 48
WORDS_PER_ROW = 30
MIB = 2**20


@dataclass(frozen=True)
class Measured:
    """An index of one size.

    Attributes:
        rows, tasks: what is in it.
        fill_seconds: from the first row to the last, and its graph brought up to date.
        first_rows_per_second, last_rows_per_second: at the first tenth, and at the last.
        memory_mib: of Chroma, before it is started anew and after that.
        disk_mib: of its folder.
        start_seconds: from its start to the first answer.
        p50_ms, p95_ms: of a search, one after the other.
        recall: of the neighbours of a query, in [0, 1].
    """

    rows: int
    tasks: int
    fill_seconds: float
    first_rows_per_second: float
    last_rows_per_second: float
    memory_mib: tuple[float, float]
    disk_mib: float
    start_seconds: float
    p50_ms: float
    p95_ms: float
    recall: float


class Drawn:
    """Rows and queries of some tasks, the same for every run."""

    def __init__(self, tasks: int) -> None:
        draws = np.random.default_rng(tasks)
        self.tasks = [f"task-{number:04d}" for number in range(tasks)]
        self._middles = _unit(draws.normal(size=(tasks, DIMENSIONS)))
        self._shared = _unit(draws.normal(size=DIMENSIONS))
        self._varied = draws.normal(size=(VARIED, DIMENSIONS)) / DIMENSIONS**0.5

    def vectors(self, tasks: np.ndarray, seed: int) -> Vectors:
        """One for each task of a list, float32 [tasks, dimensions], each of length 1."""
        apart = np.random.default_rng((seed, 1)).normal(size=(len(tasks), VARIED)) / VARIED**0.5
        return _unit(0.5 * self._shared + 0.6 * self._middles[tasks] + 0.6 * apart @ self._varied).astype(np.float32)

    def parts(self, rows: int, at_once: int) -> Iterator[tuple[list[Entry], Vectors]]:
        """All rows, task by task, as a run of indexing writes them."""
        for seed, first in enumerate(range(0, rows, at_once)):
            numbers = np.arange(first, min(first + at_once, rows))
            tasks = numbers * len(self.tasks) // rows
            words = np.random.default_rng((seed, 2)).choice(WORDS, size=(len(numbers), WORDS_PER_ROW))
            texts = [f"{number} {' '.join(chosen)}" for number, chosen in zip(numbers, words, strict=True)]
            names = [self.tasks[task] for task in tasks]
            entries = [Entry(row_identifiers(name, [text])[0], name, text) for name, text in zip(names, texts, strict=True)]
            yield entries, self.vectors(tasks, seed)


def main(
    rows: Annotated[str, typer.Option(help="rows of each index, separated by commas")] = "34000,100000",
    tasks: Annotated[str, typer.Option(help="tasks of each index")] = "22,100",
    queries: Annotated[int, typer.Option(min=20, help="searches that are timed")] = 500,
    neighbours: Annotated[int, typer.Option(min=1, help="rows of an answer")] = 20,
    to: Annotated[Path | None, typer.Option("--json", help="write what was measured to this file")] = None,
) -> None:
    """Measure and print a table."""
    sizes = list(zip(map(int, rows.split(",")), map(int, tasks.split(",")), strict=True))
    found = [_measure(count, kinds, queries, neighbours) for count, kinds in sizes]
    columns = ("rows", "tasks", "filled", "rows/s, first to last tenth", "memory MiB, filled and started anew", "disk MiB")
    table = [
        (
            f"{one.rows:,}",
            f"{one.tasks:,}",
            f"{one.fill_seconds:,.0f} s",
            f"{one.first_rows_per_second:,.0f} to {one.last_rows_per_second:,.0f}",
            " and ".join(f"{mib:,.0f}" for mib in one.memory_mib),
            f"{one.disk_mib:,.0f}",
        )
        for one in found
    ]
    measured = {"neighbours": neighbours, "queries": queries, "sizes": [asdict(one) for one in found]}
    tell("An index, filled", columns, table, measured, to)
    searched = [
        (f"{one.rows:,}", f"{one.start_seconds:.1f} s", f"{one.p50_ms:.1f}", f"{one.p95_ms:.1f}", f"{one.recall:.1%}")
        for one in found
    ]
    columns = ("rows", "start to first answer", "p50 ms", "p95 ms", f"recall of {neighbours}")
    tell("The same, searched", columns, searched, measured, to)


def _measure(rows: int, tasks: int, queries: int, neighbours: int) -> Measured:
    folder = Path(tempfile.mkdtemp(prefix="lorafleet-bench-"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    settings = load_settings(state=folder, index={"url": url})
    drawn = Drawn(tasks)
    asked = drawn.vectors(np.arange(queries) * tasks // queries, seed=10**6)
    server.start(settings)
    try:
        index = open_for_writing(settings, prompt_version())
        nearest, marks = _fill(index, drawn, rows, asked, neighbours, settings.index.write_batch)
        filled = _memory(settings)
        server.stop(settings)
        start = time.perf_counter()
        server.start(settings)
        index = open_for_writing(settings, prompt_version())
        index.query(asked[:1], neighbours, texts=False)
        started = time.perf_counter() - start
        times, hits = [], 0
        for query, near in zip(asked, nearest, strict=True):
            before = time.perf_counter()
            (answer,) = index.query(query[None], neighbours, texts=False)
            times.append(1000 * (time.perf_counter() - before))
            # As near as the farthest of the nearest, but for float32's last bits.
            hits += sum(one.similarity >= near - 1e-5 for one in answer)
        tenth = max(1, len(marks) // 10)
        p50, p95 = np.percentile(times, (50, 95))
        return Measured(
            rows=rows,
            tasks=tasks,
            fill_seconds=marks[-1][1],
            first_rows_per_second=_speed(marks[: tenth + 1]),
            last_rows_per_second=_speed(marks[-tenth - 1 :]),
            memory_mib=(filled, _memory(settings)),
            disk_mib=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / MIB,
            start_seconds=started,
            p50_ms=float(p50),
            p95_ms=float(p95),
            recall=hits / (neighbours * queries),
        )
    finally:
        server.stop(settings)
        shutil.rmtree(folder, ignore_errors=True)


def _fill(
    index: CorpusIndex, drawn: Drawn, rows: int, asked: Vectors, neighbours: int, at_once: int
) -> tuple[np.ndarray, list[tuple[int, float]]]:
    """Write all rows, and let them be searched.

    Returns:
        how near the farthest row of each query's answer has to be, [queries]; and how many rows there were after how long.
    """
    nearest = np.full((len(asked), neighbours), -1.0, dtype=np.float32)
    version = NextVersion(index, 0, rebuild=True)
    marks, seconds = [(0, 0.0)], 0.0
    with progress(f"{rows:,} rows written", rows) as bar:
        for entries, vectors in drawn.parts(rows, at_once):
            start = time.perf_counter()
            version.write(entries, vectors)
            seconds += time.perf_counter() - start
            marks.append((marks[-1][0] + len(entries), seconds))
            both = np.concatenate([nearest, asked @ vectors.T], axis=1)
            nearest = np.partition(both, -neighbours, axis=1)[:, -neighbours:]
            bar.advance(len(entries))
    start = time.perf_counter()
    with index.changing():
        version.switch(replace(index.plan(version.version.number), rows=version.version.counts()))
    marks[-1] = (marks[-1][0], seconds + time.perf_counter() - start)
    return nearest.min(axis=1), marks


def _speed(marks: list[tuple[int, float]]) -> float:
    return float(np.mean([(now[0] - before[0]) / (now[1] - before[1]) for before, now in itertools.pairwise(marks)]))


def _memory(settings: Settings) -> float:
    record = json.loads((server.run_folder_of(settings) / "chroma.json").read_text(encoding="utf-8"))
    return float(psutil.Process(record["pid"]).memory_info().rss / MIB)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


if __name__ == "__main__":
    typer.run(main)
