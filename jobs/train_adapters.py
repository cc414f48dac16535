"""Train the adapters that are missing or no longer current, fanned out over a Ray cluster.

Long-lived Ray Train workers load the base model once and take adapter after adapter, longest first, from a queue actor.
Ray Train restarts the workers when one dies; adapters that were whole by then stay, those in hand are handed out again and
go on from their checkpoints, as they do when the job is submitted anew after its driver died.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import ray
import ray.train
import torch
import typer
from ray.actor import ActorHandle
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from jobs.cluster import cause_of, connect
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
from lorafleet.errors import LoRAFleetError, TrainingError
from lorafleet.models import check_readable
from lorafleet.progress import Bar, progress
from lorafleet.tasks import Corpus, load_catalogue, load_corpus
from lorafleet.training import (
    AdapterCard,
    adapter_name,
    choose_backend,
    delete_checkpoints,
    is_current,
    optimiser_steps,
    read_card,
    sweep,
    train_adapter,
)

POLL_SECONDS = 1.0
SHOWN_BAD_ROWS = 3


@dataclass(frozen=True)
class TrainReport:
    """What a run of the job did.

    Attributes:
        adapters: the card of every current adapter by task, those that were skipped among them.
        skipped: tasks whose adapter was current already.
        failed: why there is no current adapter, by task.
        seconds: the whole run.
    """

    adapters: dict[str, AdapterCard]
    skipped: tuple[str, ...]
    failed: dict[str, str]
    seconds: float


@dataclass(frozen=True)
class QueueView:
    """What the queue knows at one moment: steps taken in all, what was last worked on, and all warnings so far."""

    steps: int
    note: str
    warnings: tuple[str, ...]


@dataclass
class AdapterQueue:
    """Hands out tasks, and keeps what came of each. A Ray actor; `in_hand` says which worker has which task."""

    corpora: dict[str, "ray.ObjectRef[Corpus]"]
    waiting: list[str]
    in_hand: dict[int, str] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    cards: dict[str, AdapterCard] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    note: str = ""

    def begin(self, worker: int) -> None:
        """A worker starts, perhaps after a death: what it had in hand goes to the end, behind those that may do no harm."""
        task = self.in_hand.pop(worker, None)
        if task is not None:
            self.steps.pop(task, None)
            self.waiting.append(task)

    def take(self, worker: int) -> "tuple[str, ray.ObjectRef[Corpus]] | None":
        """The next task with the reference of its corpus; None when there is no more."""
        if not self.waiting:
            return None
        task = self.waiting.pop(0)
        self.in_hand[worker] = task
        return task, self.corpora[task]

    def step(self, task: str, step: int, loss: float) -> None:
        """A worker took an optimiser step."""
        self.steps[task] = step
        self.note = f"{task}, loss {loss:.2f}"

    def done(self, worker: int, card: AdapterCard) -> None:
        """A worker's adapter is whole."""
        self.in_hand.pop(worker, None)
        self.cards[card.task] = card

    def fail(self, worker: int, task: str, reason: str) -> None:
        """A worker's adapter cannot be trained."""
        self.in_hand.pop(worker, None)
        self.failed[task] = reason

    def warn(self, warning: str) -> None:
        """A worker tells something that the user should know."""
        self.warnings.append(warning)

    def abandon(self, reason: str) -> None:
        """No worker can train anything: what waits fails for the same reason, instead of worker after worker dying of it."""
        self.failed |= dict.fromkeys(self.waiting, reason)
        self.waiting.clear()

    def view(self) -> QueueView:
        """Where the work stands."""
        return QueueView(sum(self.steps.values()), self.note, tuple(self.warnings))

    def outcome(self) -> tuple[dict[str, AdapterCard], dict[str, str]]:
        """The cards and the failures by task."""
        return self.cards, self.failed


def train_adapters(settings: Settings, force: bool = False) -> TrainReport:
    """Train every adapter that is missing, or whose rows, base model or recipe changed.

    A task that fails is recorded and does not stop the others.

    Args:
        force: train all adapters from the first step, the current ones too.

    Raises:
        LoRAFleetError: settings or base model cannot be used, or no worker can be started.
    """
    started = monotonic()
    check_readable(settings.models)
    if settings.training.backend == "unsloth" and not settings.training.gpus_per_worker:
        raise TrainingError(
            "training.backend is unsloth and training.gpus_per_worker is 0", "Set training.gpus_per_worker to 1"
        )
    corpora, failed = _read_corpora(settings)
    current: dict[str, AdapterCard] = {}
    for task, corpus in corpora.items():
        folder = settings.adapters / adapter_name(settings, task)
        card = None if force else read_card(folder)
        if card is not None and is_current(card, corpus, settings):
            current[task] = card
            sweep(folder)
        if force or task in current:
            delete_checkpoints(folder)
    missing = {task: corpus for task, corpus in corpora.items() if task not in current}
    _print_plan(settings, current, missing)
    trained: dict[str, AdapterCard] = {}
    if missing:
        trained, reasons = _fan_out(settings, missing)
        failed |= reasons
    known = current | trained
    adapters = {task: known[task] for task in corpora if task in known}
    return TrainReport(adapters, tuple(current), failed, round(monotonic() - started, 2))


def _read_corpora(settings: Settings) -> tuple[dict[str, Corpus], dict[str, str]]:
    """The training rows of every task, and why there are none for the rest; damaged rows are warned of."""
    corpora: dict[str, Corpus] = {}
    failed: dict[str, str] = {}
    for task in load_catalogue(settings.tasks).trained:
        try:
            corpus = load_corpus(task, "train", settings.tasks)
        except LoRAFleetError as error:
            failed[task.name] = str(error)
            continue
        corpora[task.name] = corpus
        if corpus.bad_rows:
            shown = "; ".join(str(row) for row in corpus.bad_rows[:SHOWN_BAD_ROWS])
            typer.echo(f"warning: {task.name}: {len(corpus.bad_rows)} bad rows skipped: {shown}", err=True)
    return corpora, failed


def _print_plan(settings: Settings, current: dict[str, AdapterCard], missing: dict[str, Corpus]) -> None:
    if current:
        typer.echo(f"Skipped, current already: {', '.join(current)}")
    rows = sum(len(corpus.examples) for corpus in missing.values())
    typer.echo(f"To train: {len(missing)} adapters on {rows} rows in {_steps(settings, missing)} steps")


def _steps(settings: Settings, corpora: dict[str, Corpus]) -> int:
    return sum(optimiser_steps(len(corpus.examples), settings.training) for corpus in corpora.values())


def _expected_work(settings: Settings, corpus: Corpus) -> float:
    """Characters that the steps will read: what an adapter costs, up to a factor."""
    cut = settings.training.max_tokens * 4
    mean = sum(min(len(example.prompt), cut) for example in corpus.examples) / len(corpus.examples)
    return mean * optimiser_steps(len(corpus.examples), settings.training)


def _fan_out(settings: Settings, corpora: dict[str, Corpus]) -> tuple[dict[str, AdapterCard], dict[str, str]]:
    """Train the adapters on the cluster: cards, and reasons of failure, by task."""
    connect()
    longest_first = sorted(corpora, key=lambda task: _expected_work(settings, corpora[task]), reverse=True)
    references = {task: ray.put(corpus) for task, corpus in corpora.items()}
    queue = ray.remote(num_cpus=0)(AdapterQueue).remote(references, longest_first)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"settings": settings, "queue": queue},
        scaling_config=_scaling(settings, len(corpora)),
        # No worker ever talks to another; gloo also lets several of them share a GPU.
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(
            name="adapters",
            storage_path=str((settings.state / "ray_train").resolve()),
            failure_config=FailureConfig(max_failures=settings.training.worker_failures),
        ),
    )
    stopped = ""
    with progress("training", _steps(settings, corpora)) as bar, _watched(queue, bar):
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            stopped = _reason(error)
    # A worker that was killed leaves what it was writing.
    for task in corpora:
        sweep(settings.adapters / adapter_name(settings, task))
    cards, failed = ray.get(queue.outcome.remote())
    ray.kill(queue)
    for task in corpora:
        if task not in cards and task not in failed:
            failed[task] = f"the workers did not finish it: {stopped or 'the run ended early'}"
    return cards, failed


def _reason(error: ray.train.TrainingFailedError) -> str:
    """Why Ray Train gave up: a worker's own error, in one line."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause = cause_of(failure)
        return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    return " ".join(str(error).split())[:300]


def _scaling(settings: Settings, adapters: int) -> ScalingConfig:
    """As many workers as the cluster has room for, and no more than there are adapters.

    Raises:
        TrainingError: the cluster has no room for a single one.
    """
    training = settings.training
    resources = {"CPU": training.cpus_per_worker}
    there = ray.cluster_resources()
    slots = there.get("CPU", 0) / training.cpus_per_worker
    if training.gpus_per_worker:
        resources["GPU"] = training.gpus_per_worker
        slots = min(slots, there.get("GPU", 0) / training.gpus_per_worker)
    if slots < 1:
        raise TrainingError(
            f"a worker needs {resources}, and the cluster has {there.get('CPU', 0):g} CPU and {there.get('GPU', 0):g} GPU",
            "Lower training.cpus_per_worker or training.gpus_per_worker, or join a larger cluster",
        )
    workers = min(training.workers or int(slots), int(slots), adapters)
    return ScalingConfig(num_workers=workers, use_gpu=training.gpus_per_worker > 0, resources_per_worker=resources)


def _work(config: dict[str, Any]) -> None:
    """What a Ray Train worker does: load the base model once, then train adapter after adapter.

    `train.report` is a barrier over all workers, and they finish at different times: the queue gets the reports instead.
    """
    settings: Settings = config["settings"]
    queue: ActorHandle = config["queue"]
    worker = ray.train.get_context().get_world_rank()
    ray.get(queue.begin.remote(worker))
    torch.set_num_threads(max(1, int(settings.training.cpus_per_worker)))
    if not settings.training.gpus_per_worker:
        settings = settings.model_copy(update={"models": settings.models.model_copy(update={"device": "cpu"})})
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("lorafleet").addHandler(_ToQueue(queue))
    try:
        model, tokenizer = choose_backend(settings).load(settings)
    except LoRAFleetError as error:
        ray.get(queue.abandon.remote(str(error)))
        return
    while (taken := ray.get(queue.take.remote(worker))) is not None:
        task, reference = taken
        name = adapter_name(settings, task)
        try:
            card = train_adapter(
                model,
                tokenizer,
                ray.get(reference),
                settings,
                name,
                Path(settings.adapters) / name,
                lambda step, loss, task=task: queue.step.remote(task, step, loss),
            )
        except Exception as error:
            reason = str(error) if isinstance(error, LoRAFleetError) else f"{type(error).__name__}: {error}"
            ray.get(queue.fail.remote(worker, task, reason))
        else:
            ray.get(queue.done.remote(worker, card))


class _ToQueue(logging.Handler):
    """Tells the queue what a worker warns of: its own log is on its own machine."""

    def __init__(self, queue: ActorHandle) -> None:
        super().__init__(logging.WARNING)
        self._queue = queue

    def emit(self, record: logging.LogRecord) -> None:
        self._queue.warn.remote(record.getMessage())


@contextmanager
def _watched(queue: ActorHandle, bar: Bar) -> Iterator[None]:
    """Move the bar by what the queue hears from the workers, and show warnings, from a thread: `fit` blocks the main one."""
    ended = threading.Event()

    def poll() -> None:
        shown, warned = 0, 0
        while True:
            last = ended.wait(POLL_SECONDS)
            view = ray.get(queue.view.remote())
            # After a worker's death steps are taken again; a bar does not go back.
            bar.advance(max(0, view.steps - shown), view.note)
            shown = max(shown, view.steps)
            for warning in view.warnings[warned:]:
                typer.echo(f"warning: {warning}", err=True)
            warned = len(view.warnings)
            if last:
                return

    thread = threading.Thread(target=poll, name="progress")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def print_report(report: TrainReport) -> None:
    """The adapters as a table, how many there are of which kind, and what failed on standard error."""
    table = Table("task", "rows", "steps", "first loss", "last loss", "seconds", "")
    for task, card in report.adapters.items():
        resumed = f"resumed after step {', '.join(map(str, card.resumed))}" if card.resumed else ""
        note = "skipped" if task in report.skipped else resumed
        figures = (card.rows, card.steps, f"{card.first_loss:.3f}", f"{card.last_loss:.3f}", f"{card.seconds:.1f}")
        table.add_row(task, *(str(figure) for figure in figures), note)
    Console().print(table)
    skipped = len(report.skipped)
    trained = len(report.adapters) - skipped
    typer.echo(f"{trained} trained, {skipped} skipped, {len(report.failed)} failed in {report.seconds:.0f} s")
    for task, reason in report.failed.items():
        typer.echo(f"failed: {task}: {reason}", err=True)


def command(
    config: ConfigOption = None,
    overrides: SetOption = [],
    state: StateOption = None,
    hub_root: HubRootOption = None,
    source: SourceOption = None,
    tasks: TasksOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Train all adapters from the first step, the current ones too.")
    ] = False,
) -> None:
    """Train the adapters that are missing or no longer current, on the Ray cluster that this runs on."""
    report = train_adapters(settings_from(config, overrides, state, hub_root, source, tasks), force)
    print_report(report)
    if report.failed:
        raise TrainingError(
            f"{len(report.failed)} adapters failed: {', '.join(report.failed)}", "Mend the causes, and run again"
        )


def main() -> None:
    """The entry of `python -m jobs.train_adapters`."""
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    application.command()(command)
    run(lambda: application())


if __name__ == "__main__":
    main()
