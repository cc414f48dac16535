"""The job that indexes corpora, against a plain loop; and what it takes of memory, whatever the number of rows.

    python -m benchmarks.embed                     rows/s, each per core, in one run
    python -m benchmarks.embed --rows 200000 --words 4 --no-plain --every 10

The plain loop is sentence-transformers' own `encode` over all texts at once, in one process: with one thread, and with one
for every core. The job is `jobs.embed_corpora` with a cluster of its own, one encoder for every core, and Chroma on the same
machine; it is timed from the first vectors that come to the last that are written, so without the start of Ray and of the
encoders, which is told beside. Memory is what a process has for itself (USS); what Ray shares between processes is apart.
With `--layers` the encoder has its first layers only: its vectors are worth nothing, and many rows go through everything
else in less time.
"""

import json
import multiprocessing
import os
import random
import socket
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from rich.console import Console

from benchmarks.report import tell
from jobs.embed_corpora import EmbedReport, embed_corpora
from lorafleet.config import Settings, load_settings
from lorafleet.models import load_encoder
from lorafleet.retrieval import server
from lorafleet.tasks import load_corpus
from lorafleet.tasks.catalogue import read_declarations

DECLARATION = """
notes:
  family: benchmark
  files: {train: notes.jsonl}
  instruction: Say what the note is about.
  text: "{note}"
  answers: about
"""
WORDS = ["river", "stone", "light", "market", "seven", "walks", "under", "blue", "question", "answer", "winter", "paper"]
PARTS = ("driver", "reader", "encoders", "the rest of Ray", "Chroma", "shared by Ray")
SHOWN = 10
MIB = 2**20
console = Console(stderr=True)


@dataclass(frozen=True)
class Sample:
    """Memory at one moment.

    Attributes:
        seconds: since the job began.
        mib: of each of PARTS.
    """

    seconds: float
    mib: dict[str, float]


@dataclass(frozen=True)
class Job:
    """A run of the job in a process of its own, watched.

    Attributes:
        report: what it did.
        samples: its memory over time.
    """

    report: EmbedReport
    samples: list[Sample]


def main(
    rows: Annotated[int, typer.Option(min=256, help="rows of the synthetic corpus")] = 6000,
    words: Annotated[int, typer.Option(min=1, help="words of a row, on average")] = 40,
    layers: Annotated[int | None, typer.Option(help="of the encoder; all where absent")] = None,
    plain: Annotated[bool, typer.Option(help="time the plain loop as well")] = True,
    again: Annotated[bool, typer.Option(help="add one row, and time the version that comes of that")] = False,
    every: Annotated[float, typer.Option(help="seconds from one look at memory to the next")] = 1,
    to: Annotated[Path | None, typer.Option("--json", help="write what was measured to this file")] = None,
) -> None:
    """Measure and print a table."""
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="lorafleet-bench-") as folder:
        settings = _settings(Path(folder), rows, words, layers)
        speeds: dict[str, float] = {}
        if plain:
            for threads in dict.fromkeys((1, cores)):
                speeds[f"plain loop, {threads} threads" if threads > 1 else "plain loop, 1 thread"] = _plain(
                    settings, threads
                )
        job = _watched(settings, every)
        speeds[f"the job, {cores} encoders"] = job.report.rows_per_second
        measured = {
            "rows": rows,
            "words": words,
            "layers": layers,
            "cores": cores,
            "rows_per_second": speeds,
            "job_seconds": job.report.seconds,
            "samples": [asdict(sample) for sample in job.samples],
        }
        _tell(job, speeds, cores, measured, to)
        if again:
            seconds = _watched(_one_row_more(settings, rows), every).report.seconds
            console.print(f"one row more: the next version, {rows:,} rows copied into it, took {seconds:,.1f} s in all")


def _tell(job: Job, speeds: Mapping[str, float], cores: int, measured: Mapping[str, Any], to: Path | None) -> None:
    used = {name: 1 if name.endswith("1 thread") else cores for name in speeds}
    best = max((speeds[name] / used[name] for name in speeds if name.startswith("plain")), default=0.0)
    short = f" by {measured['layers']} of the encoder's layers" if measured["layers"] else ""
    what = f"{measured['rows']:,} rows of {measured['words']} words on average embedded{short}"
    table = [
        (name, used[name], speed, speed / used[name], f"{speed / used[name] / best:.2f}x" if best else "")
        for name, speed in speeds.items()
    ]
    columns = ("side", "cores", "rows/s", "rows/s a core", "against the better plain loop")
    tell(f"{what}; the job took {job.report.seconds:,.0f} s in all", columns, table, measured, to)
    step = max(1, len(job.samples) // SHOWN)
    memory = [(f"{one.seconds:,.0f} s", *(round(one.mib[part]) for part in PARTS)) for one in job.samples[step // 2 :: step]]
    tell("Memory over time, MiB", ("after", *PARTS), memory, measured, to)


def _settings(folder: Path, rows: int, words: int, layers: int | None) -> Settings:
    """A corpus of random words, and a state, a port and, where its layers are counted, an encoder of its own."""
    draws = random.Random(0)
    with (folder / "notes.jsonl").open("w", encoding="utf-8") as file:
        for number in range(rows):
            note = " ".join(draws.choices(WORDS, k=draws.randint(1, 2 * words - 1)))
            file.write(json.dumps({"note": f"{number} {note}", "about": "words"}) + "\n")
    (folder / "tasks.yaml").write_text(DECLARATION, encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    tasks = {"declarations": [folder / "tasks.yaml"], "names": ["notes"], "rows_per_task": rows}
    settings = load_settings(state=folder / "state", index={"url": url}, tasks=tasks)
    if layers is None:
        return settings
    encoder = load_encoder(settings.models)
    bert: Any = encoder[0].auto_model
    bert.encoder.layer = bert.encoder.layer[:layers]
    bert.config.num_hidden_layers = layers
    encoder.save(str(folder / "encoder"))
    return settings.model_copy(update={"models": settings.models.model_copy(update={"encoder": str(folder / "encoder")})})


def _one_row_more(settings: Settings, rows: int) -> Settings:
    with settings.tasks.declarations[0].with_name("notes.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"note": "one more", "about": "words"}) + "\n")
    return settings.model_copy(update={"tasks": settings.tasks.model_copy(update={"rows_per_task": rows + 1})})


def _plain(settings: Settings, threads: int) -> float:
    """Rows a second by sentence-transformers alone."""
    (task,) = (task for task in read_declarations(settings.tasks.declarations[0]))
    texts = [example.key for example in load_corpus(task, "train", settings.tasks).examples]
    model = load_encoder(settings.models)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    batch = settings.index.encode_batch
    model.encode(texts[:batch], batch_size=batch, show_progress_bar=False)
    start = time.perf_counter()
    model.encode(texts, batch_size=batch, normalize_embeddings=True, show_progress_bar=False)
    speed = len(texts) / (time.perf_counter() - start)
    torch.set_num_threads(before)
    console.print(f"plain loop, {threads} threads: {speed:,.1f} rows/s")
    return speed


def _watched(settings: Settings, every: float) -> Job:
    """Run the job, and look at the memory of everything that belongs to it."""
    samples: list[Sample] = []
    spawning = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, spawning, _not_nice) as executor:
            driver = executor.submit(os.getpid).result()
            start = time.monotonic()
            running = executor.submit(embed_corpora, settings)
            while wait([running], timeout=every).not_done:
                samples.append(Sample(time.monotonic() - start, _memory(driver, settings)))
            return Job(running.result(), samples)
    finally:
        server.stop(settings)


def _not_nice() -> None:
    # Ray's workers are nice by 15 of 19: on a machine that others use as well, that would be measured.
    os.environ |= {"RAY_worker_niceness": "0"}


def _memory(driver: int, settings: Settings) -> dict[str, float]:
    """MiB of each part."""
    found = dict.fromkeys(PARTS, 0.0)
    processes = {driver: "driver"}
    record = server.run_folder_of(settings) / "chroma.json"
    if record.exists():
        processes[json.loads(record.read_text(encoding="utf-8"))["pid"]] = "Chroma"
    try:
        children = psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    for process in children:
        processes.setdefault(process.pid, _part(process))
    for pid, part in processes.items():
        try:
            memory = psutil.Process(pid).memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        found[part] += memory.uss / MIB
        if part == "the rest of Ray":
            # The store belongs to the raylet; who else maps it does not count it again.
            found["shared by Ray"] = max(found["shared by Ray"], memory.shared / MIB)
    return found


def _part(process: psutil.Process) -> str:
    try:
        title = " ".join(process.cmdline()[:2])
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return "the rest of Ray"
    if "_EncodeParcels" in title:
        return "encoders"
    return "reader" if "Read" in title else "the rest of Ray"


if __name__ == "__main__":
    typer.run(main)
