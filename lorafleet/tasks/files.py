"""Rows of a CSV, JSONL or Parquet file, each with the line that it stands on."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet

from lorafleet.errors import TaskError
from lorafleet.tasks.task import BadRowError

Row = dict[str, Any]
NumberedRow = tuple[int, Row | BadRowError]


def read_rows(path: Path) -> Iterator[NumberedRow]:
    """The rows of a file with their line numbers (row numbers for Parquet), from 1. A damaged line comes as its error.

    Raises:
        TaskError: the file cannot be read, or is of a kind that is not known.
    """
    readers = {".csv": _csv, ".jsonl": _jsonl, ".json": _jsonl, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise TaskError(f"{path} is of no known kind", f"Give a file that ends in {', '.join(readers)}")
    try:
        yield from reader(path)
    except (OSError, csv.Error, pyarrow.ArrowException) as error:
        raise TaskError(f"cannot read {path}: {error}") from None


def _jsonl(path: Path) -> Iterator[NumberedRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _object(line.rstrip(b"\r\n"))


def _object(line: bytes) -> Row | BadRowError:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRowError(f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return BadRowError(f"not JSON: {error.msg} at column {error.colno}")
    return row if isinstance(row, dict) else BadRowError("not a JSON object")


def _csv(path: Path) -> Iterator[NumberedRow]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            yield reader.line_num, _cells(row)


def _cells(row: Row) -> Row | BadRowError:
    if None in row:
        return BadRowError("more cells than the header has")
    for column, cell in row.items():
        if isinstance(cell, str) and not cell.isascii():
            try:
                cell.encode("utf-8")
            except UnicodeEncodeError:
                return BadRowError(f"{column} is not UTF-8")
    return row


def _parquet(path: Path) -> Iterator[NumberedRow]:
    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield number, row
