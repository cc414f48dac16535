"""The pages of a Parquet column by their headers, without decoding them: pyarrow shows only what the file's metadata claim.

A header is a Thrift structure in the compact protocol; of its fields, by their numbers in parquet.thrift, a few are read.
"""

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
BOOLEANS, BYTE, INT16, INT32, INT64, DOUBLE, BINARY, LISTS, STRUCTURE = (1, 2), 3, 4, 5, 6, 7, 8, (9, 10), 12


@dataclass
class Pages:
    """What the pages of a column say of themselves.

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


def read_pages(file: BinaryIO, begin: int, size: int) -> Pages:
    """The pages of a column.

    Args:
        begin: where the first one is in the file.
        size: how many bytes they have with their headers.

    Raises:
        ValueError: a header is damaged.
    """
    pages = Pages()
    file.seek(begin)
    while file.tell() < begin + size:
        header = _structure(file, 0)
        decoded, stored = header.get(UNCOMPRESSED_SIZE), header.get(COMPRESSED_SIZE)
        if not isinstance(decoded, int) or not isinstance(stored, int) or min(decoded, stored) < 0:
            raise ValueError(f"the page at byte {begin} has a damaged header")
        pages.decoded += decoded
        pages.largest = max(pages.largest, decoded)
        for kind, encoding in ENCODING.items():
            found = header.get(kind)
            if isinstance(found, dict):
                pages.encodings.add(found.get(encoding, -1))
                pages.values += max(0, found.get(1, 0))
        file.seek(stored, 1)
    return pages


def _structure(file: BinaryIO, depth: int) -> dict[int, Any]:
    """The 32-bit numbers and structures among a structure's fields."""
    fields: dict[int, Any] = {}
    number = 0
    while head := _byte(file):
        # As Arrow's reader, which has 16 bits for a field's number, and passes over fields of another kind.
        number = (number + (head >> 4) if head >> 4 else _integer(file)) & 0xFFFF
        kind = head & 15
        # A boolean is all in its head.
        value = None if kind in BOOLEANS else _value(file, kind, depth)
        if kind in (INT32, STRUCTURE):
            fields[number] = value
    return fields


def _value(file: BinaryIO, kind: int, depth: int) -> Any:
    if depth > DEEPEST:
        raise ValueError("a page's header is nested too deep")
    if kind in (*BOOLEANS, BYTE):
        return _byte(file)
    if kind in (INT16, INT32, INT64):
        return _integer(file)
    if kind == DOUBLE:
        return _skip(file, 8)
    if kind == BINARY:
        return _skip(file, _unsigned(file))
    if kind in LISTS:
        head = _byte(file)
        for _ in range(head >> 4 if head >> 4 < 15 else _unsigned(file)):
            _value(file, head & 15, depth + 1)
        return None
    if kind == STRUCTURE:
        return _structure(file, depth + 1)
    raise ValueError(f"a page's header has a field of the unknown kind {kind}")


def _byte(file: BinaryIO) -> int:
    read = file.read(1)
    if not read:
        raise ValueError("the file ends within a page's header")
    return read[0]


def _skip(file: BinaryIO, count: int) -> None:
    file.seek(count, 1)


def _unsigned(file: BinaryIO) -> int:
    found = shift = 0
    while shift < 70:
        byte = _byte(file)
        found |= (byte & 127) << shift
        if byte < 128:
            return found
        shift += 7
    raise ValueError("a page's header has a number of too many bytes")


def _integer(file: BinaryIO) -> int:
    unsigned = _unsigned(file)
    return (unsigned >> 1) ^ -(unsigned & 1)
