"""How often the task that a row belongs to is found by it: what a retriever is worth, before anything is answered."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lorafleet.config import Settings
from lorafleet.evaluation.bench import Bench
from lorafleet.evaluation.intervals import Bootstrap, Estimate
from lorafleet.evaluation.queries import FORMS, QueryForm
from lorafleet.evaluation.ranking import ranked
from lorafleet.progress import Bar

RANKS = (1, 3, 5, 8)
Ranked = Sequence[Sequence[tuple[str, float]]]
"""Of each row of a task the tasks that were found with their shares, the heaviest first."""


@dataclass(frozen=True)
class Found:
    """How often an encoder finds the own task of queries of one form, in per cent, a mean over tasks.

    Attributes:
        encoder: as it is called in the table.
        tasks: which ones, such as those that it has not seen; `count` of them with `queries` rows in all.
        first: by rank, how often the own task is among so many.
        family: how often the first is of the own family.
    """

    encoder: str
    tasks: str
    count: int
    queries: int
    form: QueryForm
    first: Mapping[int, Estimate]
    family: Estimate


class EveryTask(Bench):
    """A bench on which the rows of every task are searched, whether it has an adapter or not."""

    @cached_property
    def indexed(self) -> list[str]:
        """The tasks that have training rows."""
        return [task.name for task in self.everything.trained]


def measure(
    name: str, settings: Settings, groups: Mapping[str, Collection[str]], limit: int | None, bar: Bar
) -> list[Found]:
    """How well the evaluation rows find their tasks among the training rows of all, compared exactly.

    Args:
        name: what the encoder of the settings is called.
        groups: tasks that are told together, by what they are called.
        limit: at most so many queries a task.
        bar: is told of each of `steps_of` steps.

    Raises:
        LoRAFleetError: rows or encoder cannot be read.
    """
    bench = EveryTask(settings, limit)
    for task in bench.indexed:
        # A task without such rows is told of before the embedding, which takes long.
        bench.rows(task)
    for task in bench.indexed:
        bench.keys(task)
        bar.advance(1, f"{name}: {task}, training rows")
    by_form: dict[QueryForm, dict[str, Ranked]] = {}
    for task in bench.indexed:
        for form in FORMS:
            found_tasks = ranked(bench, bench.rows(task), settings, form)
            by_form.setdefault(form, {})[task] = [list(one.items()) for one in found_tasks]
        bench.forget()
        bar.advance(1, f"{name}: {task} as queries")
    families = {task.name: task.family for task in bench.everything.values()}
    bootstrap = Bootstrap(settings.evaluation.resamples, settings.evaluation.seed)
    found = []
    for group, tasks in groups.items():
        for form, by_task in by_form.items():
            rows = {task: of_task for task, of_task in by_task.items() if task in tasks}
            if rows:
                first = {rank: accuracy(bootstrap, rows, rank) for rank in RANKS}
                queries = sum(len(of_task) for of_task in rows.values())
                family = accuracy(bootstrap, rows, 1, families)
                found.append(Found(name, group, len(rows), queries, form, first, family))
    return found


def steps_of(settings: Settings) -> int:
    """How many steps `measure` takes."""
    return 2 * len(EveryTask(settings).indexed)


def accuracy(
    bootstrap: Bootstrap, rows: Mapping[str, Ranked], rank: int, families: Mapping[str, str] | None = None
) -> Estimate:
    """How often the own task, or one of its family, is among the first tasks found, in per cent, a mean over tasks."""

    def meant(task: str) -> str:
        return families.get(task, task) if families else task

    scores = {
        task: np.array([100.0 * (meant(task) in [meant(other) for other, _ in found[:rank]]) for found in of_task])
        for task, of_task in rows.items()
    }
    return bootstrap.mean(scores)
