"""Rows of a Parquet file. A few hundred bytes of one can stand for gigabytes, so what is decoded is counted on the way."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from lorafleet.errors import TaskError
from lorafleet.tasks.bounds import ROW_BOUND, ByteLimit, Decoded
from lorafleet.tasks.parquet_pages import DELTA, REPEATING, ColumnPages, read_chunks, read_pages
from lorafleet.tasks.values import BadRowError, NumberedRow, Row

BATCH_ROWS = 1024
READ_AT_ONCE = 2**20
# Text is repeated in rows, and compressed: real files decode to some ten times their size.
LEAST_LIMIT = 2**26
MOST_EXPANSION = 100
OVERHEAD = 16
"""Bytes of a value or row besides its content."""
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8, "BYTE_ARRAY": 4}


def parquet_rows(path: Path, columns: frozenset[str], limit: ByteLimit | None = None) -> Iterator[NumberedRow]:
    """The rows of a Parquet file with their numbers, from 1.

    Raises:
        TaskError: it cannot be read, has none of the columns, or decodes to too much.
    """
    # Arrow raises Python's own errors too, of many kinds, for what is in a damaged file.
    try:
        yield from _rows(path, columns, limit)
    except (TaskError, OSError):
        raise
    except Exception as error:
        raise TaskError(f"cannot read {path}: {' '.join(str(error).split()) or type(error).__name__}") from None


def _rows(path: Path, columns: frozenset[str], limit: ByteLimit | None) -> Iterator[NumberedRow]:
    size = path.stat().st_size
    own = ByteLimit(max(LEAST_LIMIT, MOST_EXPANSION * size))
    decoded = Decoded(path, own if limit is None or own.count < limit.count else limit)
    number = 0
    # Opened here: Arrow would take some paths for URIs.
    with path.open("rb") as file:
        metadata = pyarrow.parquet.read_metadata(file)
        names = _wanted(path, metadata, columns)
        leaves = [at for at in range(metadata.num_columns) if metadata.schema.column(at).path.split(".")[0] in names]
        pages = _checked_pages(file, metadata, leaves, decoded)
        delta = {at: groups for at, groups in pages.items() if any(DELTA & one.encodings for one in groups)}
        # Each text of a dictionary is there once, however many rows have it. Arrow cannot do so for the delta encodings.
        repeated = [metadata.schema.column(at) for at in leaves if at not in delta]
        parquet = pyarrow.parquet.ParquetFile(
            file,
            metadata=metadata,
            read_dictionary=[leaf.path for leaf in repeated if leaf.physical_type == "BYTE_ARRAY"],
            buffer_size=READ_AT_ONCE,
        )
        batch_rows = _rows_at_once(metadata, delta, decoded)
        for batch in parquet.iter_batches(batch_size=batch_rows, columns=sorted(names), use_threads=False):
            for row in _converted(batch, decoded):
                number += 1
                yield number, row


def _wanted(path: Path, metadata: Any, columns: frozenset[str]) -> frozenset[str]:
    there = metadata.schema.to_arrow_schema().names
    wanted = columns.intersection(there)
    if not wanted:
        raise TaskError(
            f"{path} has none of the columns {', '.join(sorted(columns))}: it has {', '.join(map(str, there))[:200]!r}"
        )
    for column in wanted:
        if there.count(column) > 1:
            raise TaskError(f"{path} has two columns of the name {column}", "Rename one of them")
    return wanted


def _checked_pages(file: Any, metadata: Any, leaves: list[int], decoded: Decoded) -> dict[int, list[ColumnPages]]:
    """The pages of each column by row groups; columns whose pages decode to too much are refused.

    Read are the pages' own headers: what the file's metadata say, nothing checks.
    """
    left = file.seek(0, os.SEEK_END)
    found: dict[int, list[ColumnPages]] = {at: [] for at in leaves}
    for chunks in read_chunks(file):
        size = 0
        for at in leaves:
            leaf, chunk = metadata.schema.column(at), chunks[at]
            left -= chunk.size
            if left < 0:
                raise ValueError("its columns overlap, or are longer than it is")
            pages = read_pages(file, chunk.begin, chunk.size)
            size += pages.decoded + pages.values * (WIDTHS.get(leaf.physical_type, leaf.length) + OVERHEAD)
            decoded.check(size)
            found[at].append(pages)
    return found


def _rows_at_once(metadata: Any, delta: dict[int, list[ColumnPages]], decoded: Decoded) -> int:
    """Choose the rows of a batch: few where the file may hold a text once for many rows, and Arrow repeats it."""
    rows = BATCH_ROWS
    for at, groups in delta.items():
        if not any(REPEATING & pages.encodings for pages in groups):
            continue
        largest = max(pages.largest for pages in groups)
        if metadata.schema.column(at).max_repetition_level:
            decoded.check(max(pages.values for pages in groups) * largest)
        rows = min(rows, max(1, ROW_BOUND // max(1, largest)))
    return rows


def _converted(batch: Any, decoded: Decoded) -> Iterator[Row | BadRowError]:
    """The rows of a batch; one that is large, or has a value that Python has not, is halved until one row is left."""
    size = _decoded_bytes(batch)
    if batch.num_rows == 1:
        decoded.add(min(size, ROW_BOUND))
        yield BadRowError(f"longer than {ROW_BOUND} bytes") if size > ROW_BOUND else _converted_row(batch)
        return
    rows = _all_converted(batch) if size <= ROW_BOUND else None
    if rows is not None:
        decoded.add(size)
        yield from rows
        return
    half = batch.num_rows // 2
    for part in (batch.slice(0, half), batch.slice(half)):
        yield from _converted(part, decoded)


def _all_converted(batch: Any) -> list[Row] | None:
    try:
        rows: list[Row] = batch.to_pylist()
    except Exception:
        return None
    return rows


def _converted_row(row: Any) -> Row | BadRowError:
    found: Row = {}
    for name in row.schema.names:
        try:
            found[name] = row.column(name)[0].as_py()
        except UnicodeDecodeError as error:
            return BadRowError(f"{name} is not UTF-8 at byte {error.start}")
        except Exception as error:
            return BadRowError(f"{name} cannot be read: {error}")
    return found


def _decoded_bytes(batch: Any) -> int:
    return int(batch.num_rows) * OVERHEAD + sum(_bytes(column) for column in batch.columns)


def _bytes(array: Any) -> int:
    """The bytes of an array's values once each is stored by itself."""
    kind, here = array.type, len(array) * OVERHEAD
    if pyarrow.types.is_dictionary(kind) and not pyarrow.types.is_primitive(kind.value_type):
        lengths = pyarrow.compute.binary_length(array.dictionary)
        return here + int(pyarrow.compute.sum(lengths.take(array.indices)).as_py() or 0)
    if pyarrow.types.is_struct(kind):
        return here + sum(_bytes(field) for field in array.flatten())
    if pyarrow.types.is_map(kind):
        return here + _bytes(array.keys) + _bytes(array.items)
    if pyarrow.types.is_nested(kind):
        return here + _bytes(array.flatten())
    return here + int(array.nbytes)
