"""What a run of the job did."""

from dataclasses import dataclass

import typer
from rich.console import Console
from rich.table import Table

from lorafleet.training import AdapterCard


@dataclass(frozen=True)
class TrainReport:
    """What a run of the job did.

    Attributes:
        adapters: the card of every current adapter by task, those that were skipped among them.
        skipped: tasks whose adapter was current already.
        failed: why there is no current adapter, by task.
        seconds: the whole run.
    """

    adapters: dict[str, AdapterCard]
    skipped: tuple[str, ...]
    failed: dict[str, str]
    seconds: float


def print_report(report: TrainReport) -> None:
    """The adapters as a table, how many there are of which kind, and what failed on standard error."""
    table = Table("task", "rows", "steps", "first loss", "last loss", "seconds", "")
    for task, card in report.adapters.items():
        resumed = f"resumed after step {', '.join(map(str, card.resumed))}" if card.resumed else ""
        note = "skipped" if task in report.skipped else resumed
        figures = (card.rows, card.steps, f"{card.first_loss:.3f}", f"{card.last_loss:.3f}", f"{card.seconds:.1f}")
        table.add_row(task, *(str(figure) for figure in figures), note)
    Console().print(table)
    skipped = len(report.skipped)
    trained = len(report.adapters) - skipped
    typer.echo(f"{trained} trained, {skipped} skipped, {len(report.failed)} failed in {report.seconds:.0f} s")
    for task, reason in report.failed.items():
        typer.echo(f"failed: {task}: {reason}", err=True)
