"""The tables as a terminal and a program get them."""

from collections.abc import Sequence
from typing import Any

from lorafleet.evaluation.plan import ASKED, Asked
from lorafleet.evaluation.results import REFERENCE, Results
from lorafleet.evaluation.under_test import Setting

TITLES: dict[Setting, str] = {
    "iid": "Own adapter in the pool",
    "ood": "Own adapter masked",
    "held_out": "Tasks without an adapter",
}
Cells = list[object]
METHODS_AT_ONCE = 5


def printed_tables(results: Results) -> list[tuple[str, list[str], list[Cells]]]:
    """For each setting a title, headings and rows: the score of every method on every task, and the mean over the tasks.

    Many methods make several tables, so that a terminal has room for each. The last one compares all methods.
    """
    found = []
    for setting in results.settings:
        methods = results.methods(setting)
        for first in range(0, len(methods), METHODS_AT_ONCE):
            shown = methods[first : first + METHODS_AT_ONCE]
            found.append((TITLES[setting], ["task", "rows", *shown], _rows(results, setting, shown)))
    return [*found, _compared(results)]


def _compared(results: Results) -> tuple[str, list[str], list[Cells]]:
    """Of every method the mean in each setting, and the share of perfect selection over the rows that both answered."""
    headings = [heading for setting in results.settings for heading in (setting, "95 %", "of perfect")]
    rows: list[Cells] = []
    for method in dict.fromkeys(method for setting in results.settings for method in results.methods(setting)):
        cells: Cells = [method]
        for setting in results.settings:
            mean, against = results.mean(setting, method), results.against(setting, method)
            cells += [f"{mean.value:.1f}", f"{mean.low:.0f}-{mean.high:.0f}"] if mean else ["-", "-"]
            cells.append(f"{against[1].value:.1f} %" if against and against[1] else "-")
        rows.append(cells)
    return "All methods, mean over tasks", ["method", *headings], rows


def _rows(results: Results, setting: Setting, methods: Sequence[str]) -> list[Cells]:
    rows: list[Cells] = []
    for task in results.tasks_of(setting):
        cells = [results.task(setting, method, task) for method in methods]
        rows.append([task, len(results.tasks[task].rows), *(f"{cell.value:.1f}" if cell else "-" for cell in cells)])
    means = [results.mean(setting, method) for method in methods]
    rows.append(["mean", sum(int(str(row[1])) for row in rows), *(f"{one.value:.1f}" if one else "-" for one in means)])
    rows.append(["95 %", "", *(f"{one.low:.0f}-{one.high:.0f}" if one else "-" for one in means)])
    return rows


def tables_as_json(results: Results, asked: Asked) -> dict[str, Any]:
    """As `lorafleet evaluate --json` prints it: one table, or with --setting all one a setting.

    A method's mean is over the tasks with an adapter where it was measured on any, else over those without.
    """
    if asked != "all":
        return {"setting": asked, "methods": _methods(results, ASKED[asked])}
    return {"settings": {setting: {"methods": _methods(results, (setting,))} for setting in results.settings}}


def _methods(results: Results, settings: tuple[Setting, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for setting in settings:
        for method in results.methods(setting):
            mean = results.mean(setting, method)
            assert mean is not None
            entry = found.setdefault(
                method, {"mean": round(mean.value, 2), "low": round(mean.low, 2), "high": round(mean.high, 2)}
            )
            against = results.against(setting, method)
            if against is not None and "to_perfect" not in entry and method != REFERENCE:
                difference, share = against
                entry["to_perfect"] = {
                    "points": [round(value, 2) for value in (difference.value, difference.low, difference.high)],
                    "per_cent": round(share.value, 1) if share else None,
                }
            for task in results.scores(setting, method):
                entry.setdefault("tasks", {})[task] = _task(results, setting, method, task)
    return found


def _task(results: Results, setting: Setting, method: str, task: str) -> dict[str, Any]:
    score, judged = results.task(setting, method, task), results.judged[setting][method][task]
    assert score is not None
    said: dict[str, Any] = {"score": round(score.value, 2), "rows": len(judged.ids)}
    said |= {"low": round(score.low, 2), "high": round(score.high, 2)}
    words = results.task(setting, method, task, "f1") if judged.f1 is not None else None
    return said | ({"f1": round(words.value, 2)} if words else {})
