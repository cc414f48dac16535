"""lorafleet evaluate."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafleet.cli.options import (
    ConfigOption,
    HubRootOption,
    JsonOption,
    SetOption,
    SourceOption,
    StateOption,
    TasksOption,
    settings_from,
    split_names,
)
from lorafleet.cli.output import print_json, print_table
from lorafleet.errors import LoRAFleetError, SettingsError
from lorafleet.progress import progress

if TYPE_CHECKING:
    from lorafleet.config import Settings
    from lorafleet.evaluation import Outcome, Plan
    from lorafleet.evaluation.plan import Asked
    from lorafleet.evaluation.records import Part
    from lorafleet.tasks import Split

SHOWN_FAILURES = 5

MethodsOption = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="Methods under test, such as cat or linear@p=0.5; all where absent."),
]
SettingOption = Annotated[
    str, typer.Option(help="iid (own adapter in the pool), ood (own adapter masked), held_out (tasks without), or all.")
]
SplitOption = Annotated[
    str,
    typer.Option(
        help="evaluation, or, to compare settings by, validation (kept from training) or train, scoring_rows of each."
    ),
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="At most so many rows a task.")]
ReportOption = Annotated[bool, typer.Option("--report", help="Write report.html and report.md beside the predictions.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Compute everything anew, what is kept too.")]
ScoringOption = Annotated[
    bool, typer.Option("--choose-scoring", help="First choose on training rows how each task's options are compared.")
]


def evaluate(
    methods: MethodsOption = None,
    names: TasksOption = None,
    setting: SettingOption = "iid",
    split: SplitOption = "evaluation",
    limit: LimitOption = None,
    report: ReportOption = False,
    kept: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="Compute the tables from predictions kept here; no model.")
    ] = None,
    scoring: ScoringOption = False,
    force: ForceOption = False,
    share: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only the i-th of n shares of the work, for processes side by side.")
    ] = None,
    config: ConfigOption = None,
    overrides: SetOption = [],
    state: StateOption = None,
    hub_root: HubRootOption = None,
    source: SourceOption = None,
    as_json: JsonOption = False,
) -> None:
    """The table of the paper on this fleet: every method on the same evaluation rows. What is computed is kept."""
    asked, rows = check_setting(setting), check_split(split)
    settings = settings_from(config, overrides, state, hub_root, source, names)
    if kept is not None:
        present(settings, kept, split_names(methods), split_names(names), asked, report, as_json)
        return
    from lorafleet.evaluation import Bench, choose_scorings, plan, run, variants
    from lorafleet.evaluation.harness import preparations, prepare, scoring_plan
    from lorafleet.evaluation.plan import ASKED
    from lorafleet.evaluation.records import split_folder

    mine = None if share is None else _share(share)
    if mine is not None:
        evaluation = settings.evaluation.model_copy(update={"gpus_per_worker": 1 / mine[1]})
        settings = settings.model_copy(update={"evaluation": evaluation})
    bench = Bench(settings, limit)
    bench.check_writable()
    chosen = variants(split_names(methods), ASKED[asked], settings.evaluation.multitask is not None)
    if scoring:
        work = scoring_plan(bench)
        with progress("choosing the scoring", work.rows(bench)) as bar:
            choose_scorings(bench, bar.advance)
    work = plan(bench, chosen, ASKED[asked], rows, force)
    check_parts(work, rows)
    with progress("looking for neighbours", preparations(bench, chosen, rows)) as bar:
        prepare(bench, chosen, bar.advance, rows)
    if mine is not None:
        work = work.share(*mine)
    with progress("evaluating", work.rows(bench)) as bar:
        outcome = run(bench, work, bar.advance)
    tell(outcome)
    if mine is None and outcome.done:
        if report and rows == "evaluation" and any(one.method.retrieves for one in chosen):
            from lorafleet.evaluation.case_study import keep_case_study

            keep_case_study(bench)
        folder = split_folder(bench.folder, rows)
        present(settings, folder, [one.name for one in chosen], list(bench.tasks), asked, report, as_json, outcome.parts)
    bench.close()
    refuse_failures(outcome)


def check_setting(setting: str) -> "Asked":
    """The setting that a command line asks for.

    Raises:
        SettingsError: there is no such setting.
    """
    # As in lorafleet.evaluation.plan, which brings torch along.
    allowed: tuple[Asked, ...] = ("iid", "ood", "held_out", "all")
    for known in allowed:
        if setting == known:
            return known
    raise SettingsError(f"--setting is {setting!r}", f"Allowed: {', '.join(allowed)}")


def check_split(split: str) -> "Split":
    """The split that a command line asks for.

    Raises:
        SettingsError: there is no such split.
    """
    # As in lorafleet.tasks.
    allowed: tuple[Split, ...] = ("evaluation", "validation", "train")
    for known in allowed:
        if split == known:
            return known
    raise SettingsError(f"--split is {split!r}", f"Allowed: {', '.join(allowed)}")


def check_parts(work: "Plan", split: "Split") -> None:
    """Refuse a plan in which there is nothing to measure.

    Raises:
        SettingsError: it is so.
    """
    if not work.parts and split == "validation":
        raise SettingsError("no task has validation rows", "Set tasks.validation_share, and train and embed with it")
    if not work.parts:
        raise SettingsError("no task has what these methods need", "Train adapters (lorafleet train), or ask for others")


def tell(outcome: "Outcome") -> None:
    """What a run did, on standard error."""
    typer.echo(f"{outcome.computed} parts computed, {outcome.kept} kept already, {len(outcome.failed)} failed", err=True)
    for part, why in list(outcome.failed.items())[:SHOWN_FAILURES]:
        typer.echo(f"failed: {part}: {why}", err=True)


def refuse_failures(outcome: "Outcome") -> None:
    """End with an error where a part failed.

    Raises:
        LoRAFleetError: one did.
    """
    if outcome.failed:
        raise LoRAFleetError(f"{len(outcome.failed)} parts failed", "Mend the causes, and run again: the rest is kept")


def present(
    settings: "Settings",
    folder: Path,
    methods: list[str] | None,
    tasks: list[str] | None,
    asked: "Asked",
    report: bool,
    as_json: bool,
    parts: "Mapping[Part, str] | None" = None,
) -> None:
    """Print the tables of kept predictions, and write the report where it is wanted: of everything that is kept.

    Args:
        parts: tables of these alone, as they would be computed today.
    """
    from lorafleet.evaluation import read_results
    from lorafleet.evaluation.intervals import Bootstrap
    from lorafleet.evaluation.plan import ASKED
    from lorafleet.evaluation.tables import printed_tables, tables_as_json

    bootstrap = Bootstrap(settings.evaluation.resamples, settings.evaluation.seed)
    results = read_results(folder, methods, tasks, ASKED[asked], bootstrap, parts)
    if report:
        from lorafleet.evaluation.report import write_report

        for path in write_report(read_results(folder, bootstrap=bootstrap)):
            typer.echo(f"Written: {path}", err=True)
    if as_json:
        print_json(tables_as_json(results, asked))
        return
    for title, headings, rows in printed_tables(results):
        typer.echo(f"\n{title}")
        print_table(headings, rows)


def _share(text: str) -> tuple[int, int]:
    number, slash, of = text.partition("/")
    if slash and number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of):
        return int(number), int(of)
    raise SettingsError(f"--share is {text!r}", "Write it as 1/4, 2/4, ...")
