"""How a benchmark tells what it measured: a table for people, JSON for programs, and what it ran on."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "transformers", "peft")


def machine() -> dict[str, str]:
    """The device and the versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads of {_cpu()}"
    return {"device": device, "python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def tell(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], measured: Mapping[str, Any], to: Path | None
) -> None:
    """Print a table; write everything as JSON where a file is given."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"{len(row)} cells under {len(columns)} headings: {row}")
        table.add_row(*(f"{cell:,.2f}" if isinstance(cell, float) else str(cell) for cell in row))
    console = Console(width=160)
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()), style="dim")
    if to is not None:
        to.write_text(json.dumps({"machine": machine(), **measured}, indent=2) + "\n", encoding="utf-8")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
