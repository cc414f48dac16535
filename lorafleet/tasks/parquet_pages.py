"""The pages of Parquet columns by their headers, without decoding them.

Footer and headers are Thrift structures in the compact protocol; of their fields, by their numbers in parquet.thrift, a few
are read. pyarrow shows no page's header, and a damaged footer's columns end the process: it lets C++ exceptions out of them.
"""

import io
import os
from dataclasses import dataclass, field
from typing import Any, BinaryIO

# Encodings by their numbers in parquet.thrift: texts after their lengths and after what they share with the one before;
# and those by which a text may be there once for many values.
DELTA = {6, 7}
REPEATING = {2, 7, 8}
UNCOMPRESSED_SIZE, COMPRESSED_SIZE = 2, 3
# The headers of data pages, of dictionary pages, and of data pages of the second version; where each has its encoding.
DATA, DICTIONARY, DATA_V2 = 5, 7, 8
ENCODING = {DATA: 2, DICTIONARY: 2, DATA_V2: 4}
DEEPEST = 16
# The kinds of values in the compact protocol.
BOOLEANS, BYTE, INT16, INT32, INT64, DOUBLE, BINARY, LIST, SET, STRUCTURE = (1, 2), 3, 4, 5, 6, 7, 8, 9, 10, 12


@dataclass
class ColumnPages:
    """The pages of a column chunk, summed up from their headers.

    Attributes:
        decoded: their bytes without compression.
        largest: those of the largest page.
        values: how many values they have, the nulls among them.
        encodings: by their numbers.
    """

    decoded: int = 0
    largest: int = 0
    values: int = 0
    encodings: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class ColumnChunk:
    """The position and size of a column's pages in the file, headers included."""

    begin: int
    size: int


def read_chunks(file: BinaryIO) -> list[list[ColumnChunk]]:
    """The columns of each row group.

    Raises:
        ValueError: the footer is damaged.
    """
    length = int.from_bytes(_end(file, 8)[:4], "little")
    footer = _structure(_Section(io.BytesIO(_end(file, length + 8)), length), 0)
    return [
        [_chunk(column.get((3, STRUCTURE), {})) for column in group.get((1, LIST), [])]
        for group in footer.get((4, LIST), [])
    ]


def _end(file: BinaryIO, count: int) -> bytes:
    """The last bytes of a file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - count))
    return file.read()


def _chunk(metadata: dict[tuple[int, int], Any]) -> ColumnChunk:
    begin, dictionary, size = (metadata.get((number, INT64), -1) for number in (9, 11, 7))
    if begin < 0 or size < 0:
        raise ValueError("the footer says of a column neither where it is nor how long")
    return ColumnChunk(dictionary if 0 < dictionary < begin else begin, size)


def read_pages(file: BinaryIO, begin: int, size: int) -> ColumnPages:
    """The pages of a column.

    Args:
        begin: where the first one is in the file.
        size: how many bytes they have with their headers.

    Raises:
        ValueError: a header is damaged.
    """
    pages = ColumnPages()
    file.seek(begin)
    section = _Section(file, begin + size)
    while file.tell() < section.end:
        header = _structure(section, 0)
        decoded, stored = header.get((UNCOMPRESSED_SIZE, INT32), -1), header.get((COMPRESSED_SIZE, INT32), -1)
        if min(decoded, stored) < 0:
            raise ValueError(f"the page at byte {begin} has a damaged header")
        pages.decoded += decoded
        pages.largest = max(pages.largest, decoded)
        for kind, encoding in ENCODING.items():
            found = header.get((kind, STRUCTURE), {})
            pages.encodings.add(found.get((encoding, INT32), -1))
            pages.values += max(0, found.get((1, INT32), 0))
        file.seek(stored, 1)
    return pages


@dataclass(frozen=True)
class _Section:
    """A part of a file that is read no further than its end, whatever sizes and counts stand in it."""

    file: BinaryIO
    end: int

    def take(self, count: int) -> bytes:
        read = self.file.read(count) if self.file.tell() + count <= self.end else b""
        if len(read) < count:
            raise ValueError("a page's header does not end where it should")
        return read

    def skip(self, count: int) -> None:
        if self.file.tell() + count > self.end:
            raise ValueError("a page's header does not end where it should")
        self.file.seek(count, 1)


def _structure(file: _Section, depth: int) -> dict[tuple[int, int], Any]:
    """A structure's fields by their numbers and kinds."""
    fields: dict[tuple[int, int], Any] = {}
    number = 0
    while head := _byte(file):
        # As Arrow's reader, which has 16 bits for a field's number, and passes over fields of another kind.
        number = (number + (head >> 4) if head >> 4 else _integer(file)) & 0xFFFF
        kind = head & 15
        # A boolean is all in its head.
        fields[number, kind] = None if kind in BOOLEANS else _value(file, kind, depth)
    return fields


def _value(file: _Section, kind: int, depth: int) -> Any:
    if depth > DEEPEST:
        raise ValueError("a page's header is nested too deep")
    if kind in (*BOOLEANS, BYTE):
        return _byte(file)
    if kind in (INT16, INT32, INT64):
        return _integer(file)
    if kind == DOUBLE:
        return file.skip(8)
    if kind == BINARY:
        return file.skip(_unsigned(file))
    if kind in (LIST, SET):
        head = _byte(file)
        count = head >> 4 if head >> 4 < 15 else _unsigned(file)
        return [_value(file, head & 15, depth + 1) for _ in range(count)]
    if kind == STRUCTURE:
        return _structure(file, depth + 1)
    raise ValueError(f"a page's header has a field of the unknown kind {kind}")


def _byte(file: _Section) -> int:
    return file.take(1)[0]


def _unsigned(file: _Section) -> int:
    found = shift = 0
    while shift < 70:
        byte = _byte(file)
        found |= (byte & 127) << shift
        if byte < 128:
            return found
        shift += 7
    raise ValueError("a page's header has a number of too many bytes")


def _integer(file: _Section) -> int:
    unsigned = _unsigned(file)
    return (unsigned >> 1) ^ -(unsigned & 1)
