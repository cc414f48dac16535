"""lorafleet tasks."""

from typing import TYPE_CHECKING, Any

from lorafleet.cli.options import (
    ConfigOption,
    HubRootOption,
    JsonOption,
    SetOption,
    SourceOption,
    TasksOption,
    settings_from,
)
from lorafleet.cli.output import print_json, print_table

if TYPE_CHECKING:
    from lorafleet.config import Tasks
    from lorafleet.tasks import Task


def tasks(
    config: ConfigOption = None,
    overrides: SetOption = [],
    hub_root: HubRootOption = None,
    source: SourceOption = None,
    names: TasksOption = None,
    as_json: JsonOption = False,
) -> None:
    """The catalogue: task, family, rows, and where the rows come from."""
    from lorafleet.tasks import load_catalogue

    settings = settings_from(config, overrides, None, hub_root, source, names).tasks
    listed = [_described(task, settings) for task in load_catalogue(settings).values()]
    if as_json:
        print_json(listed)
    else:
        headings = ["task", "family", "train", "evaluation", "bad", "source"]
        print_table(headings, [[task[heading] for heading in headings] for task in listed])


def _described(task: "Task", settings: "Tasks") -> dict[str, Any]:
    from lorafleet.tasks import load_corpus

    declared = task.splits if task.hub else task.files
    corpora = {split: load_corpus(task, split, settings) for split in declared}
    rows = {split: len(corpora[split].examples) if split in corpora else 0 for split in ("train", "evaluation")}
    bad = sum(len(corpus.bad_rows) for corpus in corpora.values())
    sources = dict.fromkeys(corpus.source for corpus in corpora.values())
    return {"task": task.name, "family": task.family, **rows, "bad": bad, "source": ", ".join(sources)}
