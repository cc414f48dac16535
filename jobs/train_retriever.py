"""Tune the sentence encoder to tell the tasks apart, and write it where `models.encoder` can name it.

    python -m jobs.train_retriever --config configs/laptop.yaml
    ray job submit --working-dir . -- python -m jobs.train_retriever --config configs/fleet.yaml

Run again, it does nothing while encoder, rows and recipe are the same. The tuned encoder is a folder that
sentence-transformers can load (`encoder` in the state folder); an index is good for the encoder that made it alone, so that
it has to be embedded again: with --embed that is done at once.
"""

import hashlib
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import ray
import torch
import typer
from ray.exceptions import RayError

from jobs.cluster import cause_in_one_line, cause_of, connect
from lorafleet.cli.evaluate import LimitOption
from lorafleet.cli.options import (
    ConfigOption,
    HubRootOption,
    SetOption,
    SourceOption,
    StateOption,
    TasksOption,
    settings_from,
)
from lorafleet.cli.output import print_table
from lorafleet.cli.running import run
from lorafleet.config import Settings
from lorafleet.errors import LoRAFleetError, SettingsError
from lorafleet.evaluation.finding import RANKS, Found, measure
from lorafleet.evaluation.finding import steps_of as measuring_steps
from lorafleet.models import fingerprint, locate
from lorafleet.progress import progress
from lorafleet.retrieval import one_at_a_time
from lorafleet.retrieval.tuning import Rows, steps_of, tuned_encoder
from lorafleet.storage import check_state_writable, folder_in_one_step, read_json, write_json
from lorafleet.tasks import FORMS, load_catalogue, load_corpus, texts_in_forms

FOLDER = "encoder"
LOCK = ".tune.lock"
CARD = "tuning.json"


@dataclass(frozen=True)
class TuneReport:
    """What a run did.

    Attributes:
        folder: of the tuned encoder.
        tasks: those that it has learned from.
        tuned: whether this run has tuned it; otherwise it was current.
    """

    folder: Path
    tasks: tuple[str, ...]
    tuned: bool


def train_retriever(settings: Settings, force: bool = False) -> TuneReport:
    """Tune the encoder on rows of the training splits, where that was not done yet.

    The folder is written in one step: a run that is killed leaves the encoder that there was.

    Args:
        force: tune it even where it is current.

    Raises:
        SettingsError: it would start from the tuned encoder itself, or nothing can be written to the state folder.
        TaskError: a corpus cannot be read, or no task is left.
        ModelError: the encoder cannot be loaded.
        TrainingError: too few tasks or rows.
        IndexUnavailable: another run tunes the encoder of this state.
        LoRAFleetError: the worker failed.
    """
    folder = settings.state.resolve() / FOLDER
    settings = _from_start(settings)
    if Path(locate(settings.models.encoder).location).resolve() == folder:
        raise SettingsError(
            f"models.encoder = {settings.models.encoder} is the tuned encoder itself",
            "Name the one to start from: --set tuning.start=...",
        )
    check_state_writable(settings.state)
    alone = one_at_a_time(settings.state / LOCK, 0, "another run tunes the encoder of this state", "Wait for its end")
    with alone:
        for left in folder.parent.glob(f".{FOLDER}.*"):
            shutil.rmtree(left, ignore_errors=True)
        rows = _rows(settings)
        card = _card(settings, rows)
        current = not force and read_json(folder / CARD) == card
        if not current:
            connect()
            _tune_on_cluster(settings, rows, folder, card)
    return TuneReport(folder, tuple(rows), not current)


def _from_start(settings: Settings) -> Settings:
    """The same with the encoder that is tuned as the one of the models."""
    if settings.tuning.start is None:
        return settings
    models = settings.models.model_copy(update={"encoder": settings.tuning.start, "encoder_revision": None})
    return settings.model_copy(update={"models": models})


def _rows(settings: Settings) -> Rows:
    """The rows to learn from, in all forms: of the tasks and rows that the seed draws."""
    tuning = settings.tuning
    tasks = sorted(load_catalogue(settings.tasks).trained, key=lambda task: task.name)
    count = min(len(tasks), max(2, round(tuning.share_of_tasks * len(tasks))))
    chosen = sorted(random.Random(tuning.seed).sample(tasks, count), key=lambda task: task.name)
    found = {}
    for task in chosen:
        examples = load_corpus(task, "train", settings.tasks).examples[: tuning.rows_per_task]
        found[task.name] = [texts_in_forms(task, example, FORMS) for example in examples]
    return found


def _card(settings: Settings, rows: Rows) -> dict[str, Any]:
    """What the tuned encoder follows from."""
    models = settings.models
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
    return {
        "encoder": models.encoder,
        "fingerprint": fingerprint(models.encoder, models.encoder_revision),
        "tuning": settings.tuning.model_dump(exclude={"start"}),
        "tasks": list(rows),
        "rows": digest,
    }


def _tune_on_cluster(settings: Settings, rows: Rows, folder: Path, card: dict[str, Any]) -> None:
    training = settings.training
    worker = ray.remote(_tune).options(
        num_cpus=training.cpus_per_worker, num_gpus=training.gpus_per_worker or None, num_returns="streaming", max_retries=0
    )
    with progress("steps of tuning", steps_of(settings.tuning, rows)) as bar:
        try:
            for reference in worker.remote(settings, rows, folder, card):
                bar.advance(1, ray.get(reference))
        except RayError as error:
            cause = cause_of(error)
            if isinstance(cause, LoRAFleetError):
                raise cause from None
            raise LoRAFleetError(f"the encoder could not be tuned: {cause_in_one_line(error)}", "Run again") from error


def _tune(settings: Settings, rows: Rows, folder: Path, card: dict[str, Any]) -> Iterator[str]:
    """Tune it and write it; yields what each step was done with. A Ray task."""
    torch.set_num_threads(max(1, int(settings.training.cpus_per_worker)))
    models = settings.models.reserving(settings.training.gpus_per_worker)
    encoder = yield from tuned_encoder(models, settings.tuning, rows, settings.index.encode_batch)
    with folder_in_one_step(folder) as beside:
        encoder.save(str(beside), create_model_card=False)
        write_json(beside / CARD, card)


def print_report(report: TuneReport, embedded: bool) -> None:
    """What was done, and what is to be done now."""
    done = "tuned" if report.tuned else "current"
    print(f"{report.folder} is {done}, on {len(report.tasks)} tasks: {', '.join(report.tasks)}")
    if not embedded:
        print(f"to use it, set models.encoder={report.folder}, and run lorafleet embed --rebuild")


def measured(settings: Settings, report: TuneReport, limit: int | None) -> list[Found]:
    """How well both encoders find the tasks of the evaluation rows, among the training rows of all tasks.

    Args:
        limit: at most so many rows a task.
    """
    every = settings.model_copy(update={"tasks": settings.tasks.model_copy(update={"names": None})})
    names = [task.name for task in load_catalogue(every.tasks).trained]
    groups = {"seen": report.tasks, "unseen": [name for name in names if name not in report.tasks], "all": names}
    sides = {"frozen": _from_start(every), "tuned": _with_tuned(every, report)}
    with progress("measuring retrieval", len(sides) * measuring_steps(every)) as bar:
        return [one for name, side in sides.items() for one in measure(name, side, groups, limit, bar)]


def print_measured(found: list[Found]) -> None:
    """The table: how often the own task is among the first, in per cent, with the interval of the very first."""
    headings = ["encoder", "tasks", "queries", "form", "top 1", "95 %", *(f"top {rank}" for rank in RANKS[1:]), "family"]
    rows = [
        [
            one.encoder,
            f"{one.count} {one.tasks}",
            one.queries,
            one.form,
            f"{one.first[1].value:.1f}",
            f"{one.first[1].low:.0f}-{one.first[1].high:.0f}",
            *(f"{one.first[rank].value:.1f}" for rank in RANKS[1:]),
            f"{one.family.value:.1f}",
        ]
        for one in found
    ]
    print_table(headings, rows)


def _with_tuned(settings: Settings, report: TuneReport) -> Settings:
    models = settings.models.model_copy(update={"encoder": str(report.folder), "encoder_revision": None})
    return settings.model_copy(update={"models": models})


def command(
    config: ConfigOption = None,
    overrides: SetOption = [],
    state: StateOption = None,
    hub_root: HubRootOption = None,
    source: SourceOption = None,
    tasks: TasksOption = None,
    force: Annotated[bool, typer.Option("--force", help="Tune it even where it is current.")] = False,
    embed: Annotated[bool, typer.Option("--embed", help="Embed the corpora again with it, into a new index.")] = False,
    measuring: Annotated[
        bool, typer.Option("--measure", help="Tell how often evaluation rows find their task, before and after.")
    ] = False,
    limit: LimitOption = None,
) -> None:
    """Tune the sentence encoder to tell the tasks apart, on the Ray cluster that this runs on."""
    if limit is not None and not measuring:
        raise SettingsError(f"--limit {limit} bounds what --measure asks, which is not given", "Give both, or neither")
    settings = settings_from(config, overrides, state, hub_root, source, tasks)
    report = train_retriever(settings, force)
    print_report(report, embed)
    if embed:
        from jobs import embed_corpora

        tuned = _with_tuned(settings, report)
        embed_corpora.print_report(embed_corpora.embed_corpora(tuned, rebuild=True), tuned)
    if measuring:
        print_measured(measured(settings, report, limit))


def main() -> None:
    """The entry of `python -m jobs.train_retriever`."""
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    application.command()(command)
    run(lambda: application())


if __name__ == "__main__":
    main()
