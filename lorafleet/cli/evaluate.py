"""lorafleet evaluate."""

from typing import Annotated

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
from lorafleet.errors import SettingsError
from lorafleet.progress import progress


def evaluate(
    methods: Annotated[str | None, typer.Option(metavar="A,B", help="Methods under test; all where absent.")] = None,
    names: TasksOption = None,
    setting: Annotated[str, typer.Option(help="iid (own adapter in the pool) or ood (own adapter masked).")] = "iid",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many evaluation rows a task.")] = None,
    config: ConfigOption = None,
    overrides: SetOption = [],
    state: StateOption = None,
    hub_root: HubRootOption = None,
    source: SourceOption = None,
    as_json: JsonOption = False,
) -> None:
    """The table of the paper on this fleet: every method on the same evaluation rows."""
    if setting not in ("iid", "ood"):
        raise SettingsError(f"--setting is {setting!r}", "Allowed: iid, ood")
    from lorafleet.evaluation import evaluate as measure
    from lorafleet.evaluation.harness import evaluation_corpora, methods_under_test
    from lorafleet.fleet import Fleet

    fleet = Fleet(settings_from(config, overrides, state, hub_root, source, names))
    chosen = split_names(methods)
    under_test = methods_under_test(chosen, "ood" if setting == "ood" else "iid")
    corpora = evaluation_corpora(fleet, limit)
    answers = sum(
        len(corpus.examples)
        for corpus in corpora
        for method in under_test.values()
        if corpus.task.trained or not method.knows_task
    )
    with progress("evaluating", answers) as bar:
        table = measure(fleet, chosen, "ood" if setting == "ood" else "iid", limit, bar.advance)
    if as_json:
        print_json(table.as_json())
        return
    columns = list(table.scores)
    rows: list[list[object]] = []
    for corpus in corpora:
        scores = [table.scores[method].get(corpus.task.name) for method in columns]
        rows.append([corpus.task.name, len(corpus.examples), *(f"{score.score:.1f}" if score else "-" for score in scores)])
    rows.append(["mean", sum(len(corpus.examples) for corpus in corpora), *(f"{table.mean(m):.1f}" for m in columns)])
    print_table(["task", "rows", *columns], rows)
