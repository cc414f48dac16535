"""AdapterSoup: one average of adapters for all rows of a domain (arXiv 2302.07027)."""

from lorafleet.composition import Composition
from lorafleet.config import Settings
from lorafleet.evaluation.averaging import averaged
from lorafleet.evaluation.bench import Bench, Rows
from lorafleet.tasks import Task


def soup(bench: Bench, rows: Rows, settings: Settings) -> list[Composition]:
    """The `k` adapters that are most like the task, three by default, averaged in their parameters with equal weights."""
    chosen = adapters_like(bench, rows.task, settings.weighing.k, rows.masked)
    return [averaged(bench, dict.fromkeys(chosen, 1 / max(len(chosen), 1)), settings)] * len(rows.examples)


def adapters_like(bench: Bench, task: Task, count: int, masked: str | None) -> list[str]:
    """The tasks within reach whose prototypes are nearest to the mean of a task's own training rows, nearest first.

    A task without training rows is known by its instruction. What is asked has no say.
    """
    known_by = bench.keys(task.name) if task.trained else bench.embed([task.instruction])
    nearest = bench.prototypes.nearest(known_by.mean(axis=0), count, among=bench.pool(masked))
    return [near.task for near in nearest]
