"""A benchmark's table has a heading for every cell."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_language_model import write_tiny_model

from benchmarks.report import tell

ROOT = Path(__file__).parents[1]


def test_compose_prints_a_heading_for_each_of_its_figures(tmp_path):
    base = write_tiny_model(tmp_path)
    command = [sys.executable, "-m", "benchmarks.compose", "--model", str(base), "--dtype", "float32", "--adapters", "4"]
    options = [
        "--rank",
        "4",
        "--each",
        "2",
        "--rows",
        "1",
        "--prompts",
        "0",
        "--methods",
        "cat",
        "--json",
        str(tmp_path / "m"),
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    heading, row = (
        re.split(r"[┃│]", line)[1:-1] for line in done.stdout.splitlines() if re.match(r"[┃│] (batch|decode)", line)
    )
    headings = [cell.strip() for cell in heading]
    assert len(headings) == len(row) == 11 and all(headings)
    (line,) = json.loads((tmp_path / "m").read_text())["lines"]
    shown = dict(zip(headings, (cell.strip() for cell in row), strict=True))
    for name in ("plain", "base", "composed"):
        assert shown[f"{name} ms"] == f"{line[f'{name}_ms']:.2f}"
    assert shown["over base"] == f"{line['composed_ms'] / line['base_ms']:.2f}x"


def test_a_row_with_other_cells_than_headings_is_refused():
    with pytest.raises(ValueError, match="3 cells under 2 headings"):
        tell("a table", ("a", "b"), [(1, 2, 3)], {}, None)
