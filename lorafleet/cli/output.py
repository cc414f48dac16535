"""How commands print."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

BAR_WIDTH = 40


def print_json(data: Any) -> None:
    """Print data for programs."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table for people; columns of numbers are set to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, heading in enumerate(headings):
        numbers = bool(rows) and all(isinstance(row[column], int | float) for row in rows)
        table.add_column(heading, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    Console().print(table)


def print_weights(weights: Mapping[str, float]) -> None:
    """Print task weights as bars."""
    if not weights:
        typer.echo("  no adapter is near: the base model answers")
        return
    width = max(len(task) for task in weights)
    for task, weight in weights.items():
        bar = "█" * max(1, round(abs(weight) * BAR_WIDTH))
        typer.echo(f"  {task:<{width}}  {weight:6.3f}  {bar}")


def _cell(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)
