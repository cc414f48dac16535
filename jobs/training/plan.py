"""What is to be trained, what that takes, and whether it can be."""

from dataclasses import dataclass

import ray
import typer
from rich.console import Console
from rich.table import Table

from jobs.cluster import cause_in_one_line
from jobs.training import room
from lorafleet.config import Settings
from lorafleet.errors import LoRAFleetError, TrainingError
from lorafleet.models import load_tokenizer, pick_device, pick_dtype
from lorafleet.tasks import Corpus, joined, load_catalogue, load_corpus
from lorafleet.training import AdapterCard, adapter_name, checks, delete_checkpoints, is_current, read_card, sweep
from lorafleet.training.figures import ModelSize, RowFigures, model_size, row_figures
from lorafleet.training.speed import Speed, expected_seconds, speed_of_cards, timed_speed

SHOWN_BAD_ROWS = 3
MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """What a run of the job is to do.

    Attributes:
        order: all tasks that have rows, as the catalogue lists them, or what is trained on all of them together.
        corpora: the rows of every task whose adapter is missing or no longer current, the most work first.
        figures: what is known of those rows.
        current: the cards of the adapters that stay as they are, by task.
        failed: why a task has no rows, by task.
        size: of the base model and of an adapter on it.
        warnings: what the user may not have meant.
    """

    order: tuple[str, ...]
    corpora: dict[str, Corpus]
    figures: dict[str, RowFigures]
    current: dict[str, AdapterCard]
    failed: dict[str, str]
    size: ModelSize
    warnings: tuple[str, ...]

    @property
    def steps(self) -> int:
        """Optimiser steps of all adapters."""
        return sum(figure.steps for figure in self.figures.values())


def make_plan(settings: Settings, force: bool) -> Plan:
    """Read the rows, see which adapters are current, and check what can be checked without a cluster.

    Args:
        force: train the current adapters, too.

    Raises:
        TrainingError: settings contradict each other, or the base model cannot be read; all that is wrong is named.
    """
    checks.refuse(checks.setting_faults(settings) + checks.base_faults(settings))
    size = model_size(settings)
    checks.refuse(checks.module_faults(settings, size))
    read, failed, warnings = _read_corpora(settings)
    if settings.training.together is not None:
        read = {settings.training.together: _together(settings, read, failed)}
    current = {} if force else _current(settings, read)
    tokenizer = load_tokenizer(settings.models)
    figures = {
        task: row_figures(tokenizer, corpus, settings.training) for task, corpus in read.items() if task not in current
    }
    longest_first = dict(sorted(figures.items(), key=lambda item: item[1].tokens, reverse=True))
    corpora = {task: read[task] for task in longest_first}
    warnings += checks.module_warnings(settings, size)
    warnings += checks.row_warnings(corpora, longest_first, settings.training)
    return Plan(tuple(read), corpora, longest_first, current, failed, size, tuple(warnings))


def tidy(settings: Settings, plan: Plan, force: bool) -> None:
    """Delete what killed processes left beside the adapters that stay, and the checkpoints that nobody will go on from."""
    for task in plan.current:
        sweep(settings.adapters / adapter_name(settings, task))
    for task in (*plan.current, *(plan.corpora if force else ())):
        delete_checkpoints(settings.adapters / adapter_name(settings, task))


def check_room(settings: Settings, plan: Plan) -> None:
    """Check the cluster, which this process has joined, and the disk.

    Raises:
        TrainingError: there is no room for the workers, their models, the adapters or the checkpoints; all is named.
    """
    training = settings.training
    faults = room.room_faults(training)
    at_once = _adapters_at_once(settings, plan)
    workers = at_once * training.workers_per_adapter
    device = pick_device("auto" if training.gpus_per_worker else "cpu")
    needed = plan.size.memory_bytes(training, pick_dtype(training.dtype, device))
    faults += room.memory_faults(training, workers, needed)
    faults += checks.disk_faults(settings.state, _disk_bytes(settings, plan, at_once))
    checks.refuse(faults)


def print_plan(plan: Plan) -> None:
    """What will be done, in two lines; warnings on standard error."""
    for warning in plan.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if plan.current:
        typer.echo(f"Skipped, current already: {', '.join(plan.current)}")
    rows = sum(figure.rows for figure in plan.figures.values())
    typer.echo(f"To train: {len(plan.corpora)} adapters on {rows} rows in {plan.steps} steps")


def print_dry_run(settings: Settings, plan: Plan) -> None:
    """The plan in full, with the time that it is expected to take on the cluster that this process has joined."""
    print_plan(plan)
    for task, reason in plan.failed.items():
        typer.echo(f"cannot be trained: {task}: {reason}", err=True)
    if not plan.corpora:
        return
    speed = speed_of_cards(settings) or _timed_on_cluster(settings, next(iter(plan.corpora.values())))
    table = Table("adapter", "rows", "cut", "steps", "tokens", "minutes")
    for column in table.columns[1:]:
        column.justify = "right"
    for task, figure in plan.figures.items():
        minutes = f"{figure.tokens / speed.tokens_per_second / 60:.1f}"
        table.add_row(task, *(f"{count:,}" for count in (figure.rows, figure.cut, figure.steps, figure.tokens)), minutes)
    Console().print(table)
    at_once = _adapters_at_once(settings, plan)
    tokens = [figure.tokens for figure in plan.figures.values()]
    in_all = expected_seconds(tokens, speed, at_once) / 60
    training = settings.training
    typer.echo(
        f"Workers: {at_once * training.workers_per_adapter}, {training.workers_per_adapter} an adapter,"
        f" each with {training.cpus_per_worker:g} CPU and {training.gpus_per_worker:g} GPU"
    )
    typer.echo(
        f"Disk: {_disk_bytes(settings, plan, at_once) / MIB:,.0f} MiB at most in {settings.state},"
        f" {plan.size.adapter_bytes / MIB:,.1f} MiB an adapter"
    )
    typer.echo(
        f"Time: about {in_all:.1f} minutes for {sum(tokens):,} tokens, at {speed.tokens_per_second:,.0f} tokens a second"
        f" and adapter, by {speed.source}; loading the model comes on top"
    )


def _read_corpora(settings: Settings) -> tuple[dict[str, Corpus], dict[str, str], list[str]]:
    """The training rows of every task, why there are none for the rest, and a warning for damaged rows."""
    corpora: dict[str, Corpus] = {}
    failed: dict[str, str] = {}
    warnings = []
    for task in load_catalogue(settings.tasks).trained:
        try:
            corpus = load_corpus(task, "train", settings.tasks)
        except LoRAFleetError as error:
            failed[task.name] = str(error)
            continue
        corpora[task.name] = corpus
        if corpus.bad_rows:
            shown = "; ".join(str(row) for row in corpus.bad_rows[:SHOWN_BAD_ROWS])
            warnings.append(f"{task.name}: {len(corpus.bad_rows)} bad rows skipped: {shown}")
    return corpora, failed, warnings


def _together(settings: Settings, corpora: dict[str, Corpus], failed: dict[str, str]) -> Corpus:
    """The rows of all tasks for the one adapter that `training.together` names.

    Raises:
        TrainingError: a task of that name has an adapter of its own, or some rows cannot be read.
    """
    name = settings.training.together
    assert name is not None
    if name in load_catalogue(settings.tasks.model_copy(update={"names": None})):
        raise TrainingError(f"training.together = {name} is the name of a task", "Choose another name")
    if failed:
        task, reason = next(iter(failed.items()))
        raise TrainingError(f"training.together: {task} cannot be read: {reason}", "Mend it, or leave the task out: --tasks")
    return joined(name, list(corpora.values()), settings.training.seed)


def _current(settings: Settings, corpora: dict[str, Corpus]) -> dict[str, AdapterCard]:
    cards = {task: read_card(settings.adapters / adapter_name(settings, task)) for task in corpora}
    return {task: card for task, card in cards.items() if card is not None and is_current(card, corpora[task], settings)}


def _adapters_at_once(settings: Settings, plan: Plan) -> int:
    return min(room.groups_in_all(settings.training), len(plan.corpora))


def _disk_bytes(settings: Settings, plan: Plan, at_once: int) -> int:
    every = settings.training.checkpoint_steps
    checkpoints = every > 0 and any(figure.steps > every for figure in plan.figures.values())
    return plan.size.disk_bytes(len(plan.corpora), at_once, checkpoints)


def _timed_on_cluster(settings: Settings, corpus: Corpus) -> Speed:
    """The speed of a worker, measured on one."""
    training = settings.training
    settings = settings.reserving(training.gpus_per_worker)
    task = ray.remote(num_cpus=training.cpus_per_worker, num_gpus=training.gpus_per_worker, max_retries=0)(timed_speed)
    try:
        speed: Speed = ray.get(task.remote(settings, corpus))
    except ray.exceptions.RayError as error:
        raise TrainingError(f"the timed steps failed: {cause_in_one_line(error)}") from None
    return speed
