"""The progress of long work: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_LINE_SECONDS = 5.0


class Bar(Protocol):
    """What long work reports to."""

    def advance(self, steps: int, note: str = "") -> None:
        """`steps` more are done; `note` says what with."""


@contextmanager
def progress(title: str, total: int) -> Iterator[Bar]:
    """Show the progress of `total` steps on standard error."""
    if not sys.stderr.isatty():
        line = _PlainLine(title, total)
        yield line
        line.end()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
        yield _RichBar(bar, title, total)


class _RichBar:
    def __init__(self, bar: Progress, title: str, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task(title, total=total, note="")

    def advance(self, steps: int, note: str = "") -> None:
        self._bar.update(self._task, advance=steps, note=note)


class _PlainLine:
    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._start = time.monotonic()
        self._last_line = self._start

    def advance(self, steps: int, note: str = "") -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._last_line >= PLAIN_LINE_SECONDS and self._done < self._total:
            self._last_line = now
            self._print(note)

    def end(self) -> None:
        if self._done:
            self._print("")

    def _print(self, note: str) -> None:
        seconds = time.monotonic() - self._start
        print(f"{self._title}: {self._done} of {self._total}, {seconds:.0f} s {note}".rstrip(), file=sys.stderr, flush=True)
