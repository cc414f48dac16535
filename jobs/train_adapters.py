"""Train the adapters that are missing or no longer current, fanned out over a Ray cluster.

    python -m jobs.train_adapters --config configs/laptop.yaml
    ray job submit --working-dir . -- python -m jobs.train_adapters --config configs/fleet.yaml

Run again, it does only what is missing or changed, and goes on with what was begun. The parts are in jobs/training.
"""

from time import monotonic
from typing import Annotated

import typer

from jobs.cluster import connect
from jobs.training.fan_out import fan_out
from jobs.training.plan import check_room, make_plan, print_dry_run, print_plan, tidy
from jobs.training.report import TrainReport, print_report
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
from lorafleet.errors import TrainingError
from lorafleet.storage import check_state_writable


def train_adapters(settings: Settings, force: bool = False) -> TrainReport:
    """Train every adapter that is missing, or whose rows, base model or recipe changed.

    A task that fails is recorded and does not stop the others.

    Args:
        force: train all adapters from the first step, the current ones too.

    Raises:
        TrainingError: settings, base model, cluster or disk do not allow it; all that is wrong is named.
        SettingsError: nothing can be written to the state folder.
        KeyboardInterrupt: it was stopped; the same call goes on with what was begun.
    """
    started = monotonic()
    check_state_writable(settings.state)
    plan = make_plan(settings, force)
    print_plan(plan)
    cards, failed = plan.current, plan.failed
    if plan.corpora:
        connect()
        check_room(settings, plan)
    tidy(settings, plan, force)
    if plan.corpora:
        trained, reasons = fan_out(settings, plan)
        cards, failed = cards | trained, failed | reasons
    adapters = {task: cards[task] for task in plan.order if task in cards}
    return TrainReport(adapters, tuple(plan.current), failed, round(monotonic() - started, 2))


def dry_run(settings: Settings, force: bool = False) -> None:
    """Print what `train_adapters` would do, and how long that would take, and change nothing.

    Raises:
        TrainingError: settings, base model, cluster or disk do not allow it; all that is wrong is named.
    """
    plan = make_plan(settings, force)
    if plan.corpora:
        connect()
        check_room(settings, plan)
    print_dry_run(settings, plan)


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
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the time that it would take, and train nothing.")
    ] = False,
) -> None:
    """Train the adapters that are missing or no longer current, on the Ray cluster that this runs on."""
    settings = settings_from(config, overrides, state, hub_root, source, tasks)
    if dry:
        dry_run(settings, force)
        return
    report = train_adapters(settings, force)
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
