"""Writing files so that a reader, or a crash, never meets a half-written one: write beside, then rename."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic_core import from_json


def write_json(path: Path, data: Any, mode: int = 0o666) -> None:
    """Write `data` as indented JSON in one step, readable for those of `mode`, less what the umask takes away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
            file.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The data of a JSON file; None where there is no such file.

    Raises:
        ValueError: it is not JSON in UTF-8, or is nested too deep.
    """
    try:
        return from_json(path.read_bytes())
    except FileNotFoundError:
        return None


@contextmanager
def folder_in_one_step(path: Path) -> Iterator[Path]:
    """A folder to fill; it takes the place of `path` when the block ends well, and vanishes when it does not."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        old = path.with_name(f".{path.name}.old")
        if path.exists():
            path.replace(old)
        beside.replace(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
