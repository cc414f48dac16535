"""Rows of a CSV, JSON, JSONL or Parquet file: the columns that are asked for, each row with the line that it begins on."""

import csv
import json
import os
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from lorafleet.errors import TaskError
from lorafleet.tasks.bounds import ROW_BOUND, ByteLimit
from lorafleet.tasks.parquet import parquet_rows
from lorafleet.tasks.values import BadRowError, NumberedRow, Row

ARRAY_CHARACTERS = 2**26
"""A JSON array is held in memory while its rows are read."""
DELIMITERS = (",", ";", "\t")
# Where files were joined, a byte order mark may stand in their midst.
BLANKS = " \t\r\n\ufeff"
SIGN = re.compile(f"[^{BLANKS}]")
# How bytes that are not UTF-8 are decoded, so that only the columns that are read need to be right.
UNDECODED = re.compile(r"[\udc80-\udcff]")

# Of the whole process: Python's own limit of 131,072 characters is below what people's documents have.
csv.field_size_limit(ROW_BOUND)


def read_rows(path: Path, columns: frozenset[str], limit: ByteLimit | None = None) -> Iterator[NumberedRow]:
    """The rows of a file with their line numbers (row numbers for Parquet), from 1. A damaged row comes as its error.

    Args:
        columns: the columns that are read; others may hold anything.
        limit: the most bytes to decode.

    Raises:
        TaskError: the file cannot be read, is of a kind that is not known, has none of the columns, or decodes to too much.
    """
    readers = {".csv": _csv, ".jsonl": _json, ".json": _json, ".parquet": parquet_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise TaskError(f"{path} is of no known kind", f"Give a file that ends in {', '.join(readers)}")
    try:
        # A pipe would be waited for.
        if path.exists() and not path.is_file():
            raise TaskError(f"cannot read {path}: it is no plain file")
        yield from reader(path, columns, limit)
    except (OSError, csv.Error, ValueError, RecursionError) as error:
        raise TaskError(f"cannot read {path}: {' '.join(str(error).split())}") from None


def _json(path: Path, columns: frozenset[str], limit: ByteLimit | None) -> Iterator[NumberedRow]:
    """One object a line, or one array of objects."""
    with _opened(path, limit) as text:
        is_array = text.read(4096).lstrip(BLANKS).startswith("[")
    with _opened(path, limit) as text:
        if is_array:
            yield from _array(path, text.read(ARRAY_CHARACTERS + 1), columns)
        else:
            yield from _objects(_lines(text), columns)


def _lines(text: TextIO) -> Iterator[str]:
    """The lines of a file; of one that is too long, the beginning."""
    while line := text.readline(ROW_BOUND + 1):
        rest = line
        while len(rest) > ROW_BOUND and not rest.endswith(("\n", "\r")):
            rest = text.readline(ROW_BOUND + 1)
        yield line


def _objects(lines: Iterator[str], columns: frozenset[str]) -> Iterator[NumberedRow]:
    for number, line in enumerate(lines, start=1):
        if len(line) > ROW_BOUND:
            yield number, BadRowError(f"longer than {ROW_BOUND} characters")
        elif line.strip(BLANKS):
            yield number, _object(line.strip(BLANKS), columns)


def _object(line: str, columns: frozenset[str]) -> Row | BadRowError:
    try:
        return _chosen(json.loads(line), columns, line)
    except (ValueError, RecursionError) as error:
        return BadRowError(_json_fault(error))


def _json_fault(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "JSON that is nested too deep"
    # Python's own bound of a number's digits.
    return f"JSON that cannot be read: {error}"


def _chosen(row: Any, columns: frozenset[str], source: str) -> Row | BadRowError:
    """The columns of a row that are read; `source` is the text that it was parsed from."""
    if isinstance(row, list):
        return BadRowError("an array, not a JSON object: write one JSON object a line")
    if not isinstance(row, dict):
        return BadRowError("not a JSON object")
    chosen = {column: row[column] for column in columns if column in row}
    if not source.isascii() and UNDECODED.search(source):
        for column, value in chosen.items():
            if wrong := _undecoded(column, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)):
                return wrong
    return chosen


def _undecoded(column: str, text: str) -> BadRowError | None:
    """The fault of a text that has bytes in it which are not UTF-8."""
    wrong = None if text.isascii() else UNDECODED.search(text)
    if wrong is None:
        return None
    return BadRowError(f"{column} is not UTF-8 at byte {len(text[: wrong.start()].encode(errors='surrogatepass'))}")


def _array(path: Path, document: str, columns: frozenset[str]) -> Iterator[NumberedRow]:
    """The rows of an array, parsed one after the other."""
    if len(document) > ARRAY_CHARACTERS:
        raise TaskError(f"{path} is an array of more than {ARRAY_CHARACTERS} characters", "Write one JSON object a line")
    decoder = json.JSONDecoder()
    at, number, seen = _next(document, document.index("[") + 1), 1, 0
    more = document[at : at + 1] != "]"
    try:
        while more:
            row, end = decoder.raw_decode(document, at)
            number, seen = number + document.count("\n", seen, at), at
            yield number, _chosen(row, columns, document[at:end])
            at = _next(document, end)
            more = document[at : at + 1] == ","
            if more:
                at = _next(document, at + 1)
        if document[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", document, at)
        if (behind := _next(document, at + 1)) < len(document):
            raise json.JSONDecodeError("Extra data behind the array", document, behind)
    except (ValueError, RecursionError) as error:
        line = document.count("\n", 0, error.pos if isinstance(error, json.JSONDecodeError) else at) + 1
        raise TaskError(
            f"cannot read {path}: line {line}: {_json_fault(error)}", "Repair the array, or write one JSON object a line"
        ) from None


def _next(document: str, at: int) -> int:
    """The position of the next character that is not blank."""
    found = SIGN.search(document, at)
    return found.start() if found else len(document)


class _Records:
    """The lines of a CSV file, for a reader that takes as many as a row has: no row is longer than all may be."""

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self.left = ROW_BOUND

    def __iter__(self) -> Iterator[str]:
        while line := self._text.readline(self.left + 1):
            self.left -= len(line)
            if self.left < 0:
                raise csv.Error(f"the row is longer than {ROW_BOUND} characters")
            yield line


def _csv(path: Path, columns: frozenset[str], limit: ByteLimit | None) -> Iterator[NumberedRow]:
    with _opened(path, limit) as text:
        records = _Records(text)
        lines = iter(records)
        blank, first = 0, next(lines, "")
        while first and not first.strip(BLANKS):
            blank, first = blank + 1, next(lines, "")
        if not first:
            return
        # Semicolons or tabs only where the header has more of the columns by them.
        delimiter = max(DELIMITERS, key=lambda sign: len(columns & set(_names(first, sign))))
        reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            number, records.left = reader.line_num + 1, ROW_BOUND
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if reader.line_num > number or header is None or records.left < 0:
                    raise _broken(path, blank + number, blank + reader.line_num, error) from None
                yield blank + number, BadRowError(f"not CSV: {error}")
                continue
            if header is None:
                header = _checked([_stripped(name) for name in cells], path, columns)
            elif cells:
                yield blank + number, _cells(header, cells, columns)


def _names(line: str, delimiter: str) -> list[str]:
    try:
        return [_stripped(name) for name in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _stripped(name: str) -> str:
    return name.strip(BLANKS)


def _checked(header: list[str], path: Path, columns: frozenset[str]) -> list[str]:
    if not columns.intersection(header):
        raise TaskError(
            f"{path} has none of the columns {', '.join(sorted(columns))}: its header is {', '.join(header)[:200]!r}",
            "Its first line has to name the columns, with commas, semicolons or tabs between them",
        )
    for column in columns:
        if header.count(column) > 1:
            raise TaskError(f"{path}: its header names the column {column} twice", "Rename one of them")
    return header


def _broken(path: Path, first: int, last: int, error: csv.Error) -> TaskError:
    where = f"line {first}" if last <= first else f"the row of lines {first} to {last}"
    return TaskError(
        f"cannot read {path}: {where}: {error}",
        f"Look for a quote in line {first} that is not closed; one within a cell is written twice",
    )


def _cells(header: list[str], cells: list[str], columns: frozenset[str]) -> Row | BadRowError:
    if len(cells) > len(header):
        return BadRowError("more cells than the header has")
    row = {name: cell for name, cell in zip(header, cells, strict=False) if name in columns}
    for column, cell in row.items():
        if wrong := _undecoded(column, cell):
            return wrong
    return row


def _opened(path: Path, limit: ByteLimit | None) -> TextIO:
    """A text file in its encoding: UTF-8, or UTF-16 or UTF-32, which their first bytes show."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit.count:
            raise TaskError(f"{path} has {size} bytes. Allowed: {limit}")
        encoding = json.detect_encoding(file.read(4))
    unicode = encoding.startswith("utf-8")
    return path.open(encoding=encoding, errors="surrogateescape" if unicode else "strict", newline="")
