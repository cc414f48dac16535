"""How the training is shown while it lasts: a live table on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jobs.training.plan import Plan
from jobs.training.queue import QueueView, Standing
from lorafleet.config import Settings

STATUS_SECONDS = 30.0
STYLES = {"waiting": "dim", "training": "bold", "saving": "bold", "done": "green", "failed": "red"}


class Watch(Protocol):
    """Is shown how the work stands, again and again."""

    def show(self, view: QueueView, groups: int) -> None:
        """How it stands now, and how many worker groups run."""


@contextmanager
def watch(settings: Settings, plan: Plan) -> Iterator[Watch]:
    """Show the training on standard error."""
    forecast = Forecast({task: figure.tokens / figure.steps for task, figure in plan.figures.items()})
    rows_a_step = settings.training.batch * settings.training.accumulation
    if not sys.stderr.isatty():
        yield _PlainLines(forecast, rows_a_step)
        return
    with Live(console=Console(stderr=True), refresh_per_second=2, transient=True) as live:
        yield _LiveTable(live, forecast, rows_a_step)


class Forecast:
    """When the whole will be done, by the tokens trained on since its first step.

    Args:
        tokens_a_step: of every adapter, on average.
    """

    def __init__(self, tokens_a_step: dict[str, float]) -> None:
        self._tokens_a_step = tokens_a_step
        self._first: tuple[float, float] | None = None

    def seconds_left(self, standings: dict[str, Standing], now: float) -> float | None:
        """Seconds until all is done; None while there is nothing to judge by."""
        done = sum(self._tokens(task, standing.step - standing.first) for task, standing in standings.items())
        left = sum(
            self._tokens(task, standing.steps - standing.step)
            for task, standing in standings.items()
            if standing.state not in ("done", "failed")
        )
        if not done:
            return None
        if self._first is None or done < self._first[1]:
            # What a killed worker had done is to do again, as far as there is no checkpoint of it.
            self._first = (now, done)
        began, done_then = self._first
        return left * (now - began) / (done - done_then) if done > done_then else None

    def _tokens(self, task: str, steps: int) -> float:
        return steps * self._tokens_a_step[task]


class _LiveTable:
    def __init__(self, live: Live, forecast: Forecast, rows_a_step: int) -> None:
        self._live, self._forecast, self._rows_a_step = live, forecast, rows_a_step
        self._warned = 0

    def show(self, view: QueueView, groups: int) -> None:
        for warning in view.warnings[self._warned :]:
            self._live.console.print(f"warning: {warning}", markup=False, highlight=False)
        self._warned = len(view.warnings)
        table = Table("adapter", "state", "step", "loss", "rows/s", "left")
        for column in table.columns[2:]:
            column.justify = "right"
        for task, standing in view.standings.items():
            cells = _cells(standing, self._rows_a_step)
            table.add_row(task, *cells, style=STYLES[standing.state])
        left = self._forecast.seconds_left(view.standings, time.monotonic())
        self._live.update(Group(table, Text(status(view, groups, left))))


class _PlainLines:
    """A line for every adapter that is done or failed, and one every STATUS_SECONDS on all of it."""

    def __init__(self, forecast: Forecast, rows_a_step: int) -> None:
        self._forecast, self._rows_a_step = forecast, rows_a_step
        self._ended: set[str] = set()
        self._warned = 0
        self._last_status = time.monotonic()

    def show(self, view: QueueView, groups: int) -> None:
        for warning in view.warnings[self._warned :]:
            _print(f"warning: {warning}")
        self._warned = len(view.warnings)
        for task, standing in view.standings.items():
            if standing.state in ("done", "failed") and task not in self._ended:
                self._ended.add(task)
                _print(self._ending(task, standing, view))
        now = time.monotonic()
        left = self._forecast.seconds_left(view.standings, now)
        if now - self._last_status >= STATUS_SECONDS and view.left:
            self._last_status = now
            _print(status(view, groups, left))

    def _ending(self, task: str, standing: Standing, view: QueueView) -> str:
        count = f"{len(self._ended)} of {len(view.standings)}"
        if standing.state == "failed":
            return f"{count}: {task} failed: {view.reasons.get(task, '')}"
        _, step, loss, rows, _ = _cells(standing, self._rows_a_step)
        return f"{count}: {task} done, step {step}, loss {loss}" + (f", {rows} rows/s" if rows else "")


def status(view: QueueView, groups: int, left: float | None) -> str:
    """All of it in one line: how many adapters are where, steps, worker groups, time left."""
    standings = view.standings.values()
    states = [standing.state for standing in standings]
    at_work = states.count("training") + states.count("saving")
    steps, taken = sum(standing.steps for standing in standings), sum(standing.step for standing in standings)
    counts = [f"{states.count('done')} done", f"{at_work} in training", f"{states.count('waiting')} waiting"]
    if "failed" in states:
        counts.append(f"{states.count('failed')} failed")
    remaining = f", {duration(left)} left" if left is not None else ""
    waits = "" if groups or not view.waiting else ", waiting for room in the cluster"
    return f"training: {', '.join(counts)}; step {taken} of {steps}, {groups} worker groups{remaining}{waits}"


def duration(seconds: float) -> str:
    """Seconds as people write them: 42 s, 3:05 min, 2:10 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02d} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def _cells(standing: Standing, rows_a_step: int) -> tuple[str, str, str, str, str]:
    """State, step, loss, rows a second, time left."""
    state = f"{standing.state}, resumed at {standing.first}" if standing.first else standing.state
    speed = standing.speed
    at_work = standing.state == "training" and speed
    return (
        state,
        f"{standing.step} of {standing.steps}",
        "" if standing.loss is None else f"{standing.loss:.3f}",
        f"{speed * rows_a_step:.1f}" if speed else "",
        duration((standing.steps - standing.step) / speed) if at_work and speed else "",
    )


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
