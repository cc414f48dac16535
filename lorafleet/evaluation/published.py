"""What the papers report, as published.yaml has it."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("published.yaml")


@cache
def published() -> Mapping[str, Any]:
    """All published figures."""
    found: Mapping[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return found


def table_3() -> dict[str, dict[str, float]]:
    """The paper's Table 3 in per cent, by task and method; a figure that was not published is left out."""
    table = published()["table_3"]
    return {
        task: {method: figure for method, figure in zip(table["columns"], figures, strict=True) if figure is not None}
        for task, figures in table["tasks"].items()
    }
