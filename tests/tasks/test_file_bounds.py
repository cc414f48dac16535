"""Parquet files that decode to a great deal more than they weigh: what is decoded is counted and bounded, never timed."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorafleet.errors import TaskError
from lorafleet.tasks.bounds import ByteLimit
from lorafleet.tasks.files import read_rows
from lorafleet.tasks.parquet import LEAST_LIMIT
from lorafleet.tasks.parquet_pages import read_pages

MIB = 2**20
COLUMNS = frozenset({"text"})
OWN_LIMIT = f"decodes to more than {LEAST_LIMIT} bytes"


@contextmanager
def arrow_memory() -> Iterator[Callable[[], int]]:
    """The most bytes that Arrow has at once."""
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        yield pool.max_memory
    finally:
        pa.set_memory_pool(before)


def same(text: str, count: int) -> pa.Array:
    """A text many times, without as many copies of it."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), [text])


def in_one_list(values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays([0, len(values)], values)


def write(path: Path, array: pa.Array, **options) -> Path:
    # Without Arrow's own schema, by which it would know a dictionary again.
    pq.write_table(pa.table({"text": array}), path, compression="zstd", store_schema=False, **options)
    return path


DELTA = {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}
BOMBS = {
    "one text for many rows": (lambda: same("a" * MIB, 500), {}),
    "a short text for many rows": (lambda: same("a" * 1000, 500_000), {}),
    "a page that compresses well": (lambda: pa.array(["a" * 100 * MIB]), {"use_dictionary": False}),
    "texts that share their beginnings": (lambda: pa.array(["a" * MIB] * 100), DELTA),
    "a list of texts that share theirs": (
        lambda: in_one_list(pa.array(["a" * MIB] * 100)),
        {"use_dictionary": False, "column_encoding": {"text.list.element": "DELTA_BYTE_ARRAY"}},
    ),
    "one row of many values": (lambda: in_one_list(same("", 20_000_000)), {}),
    "nulls": (lambda: pa.nulls(30_000_000, pa.string()), {}),
    "equal numbers": (lambda: pa.array([True]).take(pa.array([0] * 8_000_000)), {}),
    "wide values": (lambda: same(b"a" * MIB, 500).cast(pa.dictionary(pa.int32(), pa.binary(MIB))), {}),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_does_not_decode_to_something_huge(tmp_path, kind):
    make, options = BOMBS[kind]
    file = write(tmp_path / "bomb.parquet", make(), **options)
    assert file.stat().st_size < 100_000
    decoded = 0
    with arrow_memory() as peak, pytest.raises(TaskError, match=OWN_LIMIT):
        for _, row in read_rows(file, COLUMNS):
            decoded += len(str(row["text"]))
    assert decoded <= LEAST_LIMIT
    assert peak() < 2 * LEAST_LIMIT


def test_one_row_of_a_great_deal_is_a_bad_one_and_the_others_are_read(tmp_path):
    lists = pa.ListArray.from_arrays([0, 1, 100_001, 100_002], same("a" * 1000, 100_002))
    file = write(tmp_path / "row.parquet", lists)
    with arrow_memory() as peak:
        rows = dict(read_rows(file, COLUMNS))
    assert rows[1] == rows[3] == {"text": ["a" * 1000]}
    assert str(rows[2]).startswith("longer than")
    assert peak() < LEAST_LIMIT


def test_the_limit_of_whoever_reads_counts_too_and_is_named(tmp_path):
    limit = ByteLimit(MIB, "serving.adapter_mib")
    file = write(tmp_path / "a.parquet", same("a" * 1000, 2000))
    assert len(list(read_rows(file, COLUMNS))) == 2000
    with pytest.raises(TaskError, match=r"decodes to more than 1048576 bytes \(serving.adapter_mib\)"):
        list(read_rows(file, COLUMNS, limit))
    for name in ("a.csv", "a.jsonl", "a.json"):
        (tmp_path / name).write_text("text\n" * MIB)
        with pytest.raises(TaskError, match=r"has 5242880 bytes. Allowed: 1048576 bytes \(serving.adapter_mib\)"):
            list(read_rows(tmp_path / name, COLUMNS, limit))


def test_of_a_column_that_nobody_reads_nothing_is_decoded(tmp_path):
    columns = {"text": ["wolf"] * 500, "other": same("a" * MIB, 500)}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", store_schema=False)
    with arrow_memory() as peak:
        assert len(list(read_rows(tmp_path / "a.parquet", COLUMNS))) == 500
    assert peak() < MIB


def test_rows_are_read_as_they_are_asked_for(tmp_path):
    texts = pa.array([f"{number:07} {'a' * 1000}" for number in range(60_000)])
    file = write(tmp_path / "a.parquet", texts, row_group_size=10_000, use_dictionary=False)
    with arrow_memory() as peak:
        assert len(list(islice(read_rows(file, COLUMNS), 10))) == 10
    assert peak() < LEAST_LIMIT // 4


def varint(number: int, width: int = 0) -> bytes:
    """A number as Thrift has it, in at least so many bytes."""
    number *= 2
    groups = [number >> shift & 127 for shift in range(0, max(7 * width, number.bit_length()), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


def test_metadata_that_lie_are_not_believed(tmp_path):
    file = write(tmp_path / "a.parquet", pa.array(["a" * 100 * MIB]), use_dictionary=False)
    claimed = varint(pq.read_metadata(file).row_group(0).column(0).total_uncompressed_size)
    content = file.read_bytes()
    assert claimed in content
    file.write_bytes(content.replace(claimed, varint(100, len(claimed))))
    assert pq.read_metadata(file).row_group(0).column(0).total_uncompressed_size == 100
    with arrow_memory() as peak, pytest.raises(TaskError, match=OWN_LIMIT):
        list(read_rows(file, COLUMNS))
    assert peak() < MIB


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_the_pages_headers_say_what_arrow_wrote(version, dictionary):
    sink = io.BytesIO()
    table = pa.table({"text": [f"{number % 50} {'a' * 90}" for number in range(5000)]})
    options = {"data_page_version": version, "use_dictionary": dictionary, "data_page_size": 5000, "compression": "zstd"}
    pq.write_table(table, sink, **options, write_page_checksum=True)
    chunk = pq.read_metadata(sink).row_group(0).column(0)
    begin = chunk.dictionary_page_offset if dictionary else chunk.data_page_offset
    pages = read_pages(sink, begin, chunk.total_compressed_size)
    assert sink.tell() == begin + chunk.total_compressed_size
    assert pages.values == 5000 + (50 if dictionary else 0)
    # The rest are the headers.
    assert 0 < chunk.total_uncompressed_size - pages.decoded < 0.05 * chunk.total_uncompressed_size + 200


def test_a_footer_that_arrow_ends_the_process_for_is_an_error(tmp_path):
    file = write(tmp_path / "a.parquet", in_one_list(pa.array(["x", "y"])))
    content = file.read_bytes()
    # Required in place of optional, so that the statistics have too many levels.
    optional, required = b"\x25\x02\x18\x07element", b"\x25\x00\x18\x07element"
    assert content.count(optional) == 1
    file.write_bytes(content.replace(optional, required))
    with pytest.raises(TaskError, match=r"cannot read .*a\.parquet: .*histogram"):
        list(read_rows(file, COLUMNS))


@pytest.mark.parametrize(
    "damaged",
    [b"", b"\x15", b"\x1c" * 1000 + b"\0", b"\x19" * 1000, b"\x15\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\0"],
)
def test_a_damaged_header_is_said_to_be_one(damaged):
    with pytest.raises(ValueError, match="header"):
        read_pages(io.BytesIO(damaged), 0, 10_000)


class Counted(io.BytesIO):
    """A file that counts the calls which read or move in it."""

    calls = 0

    def read(self, size: int | None = -1) -> bytes:
        self.calls += 1
        assert self.calls < 1000
        return super().read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        self.calls += 1
        assert self.calls < 1000
        return super().seek(offset, whence)


def test_a_header_costs_no_more_than_the_bytes_it_has():
    """A list that claims 10^9 numbers, and one that goes on behind the column: many columns could share those bytes."""
    claimed = b"\x19\xf7" + varint(5 * 10**8)
    with pytest.raises(ValueError, match="does not end where it should"):
        read_pages(Counted(claimed), 0, 1000)
    listed = b"\x19\xf3" + varint(10_000 // 2) + bytes(10_000)
    with pytest.raises(ValueError, match="does not end where it should"):
        read_pages(Counted(listed), 0, 20)
