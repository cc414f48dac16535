"""Row files as people have them (encodings, delimiters, quotes, types): rows that are right, or a line and a reason."""

import csv
import datetime
import gzip
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafleet.config import Tasks
from lorafleet.errors import TaskError
from lorafleet.tasks import CorpusRows, load_corpus
from lorafleet.tasks.bounds import ROW_BOUND
from lorafleet.tasks.catalogue import read_declarations
from lorafleet.tasks.files import read_rows

TASK = """
animals:
  family: test
  files: {{train: "{file}"}}
  instruction: Is it wild?
  text: "Animal: {{animal}}"
  options: [tame, wild]
  label: kind
"""
COLUMNS = frozenset({"animal", "kind"})
NONE_MISSING = [{"animal": "wolf", "kind": 1}, {"animal": "cow", "kind": 0}]


@pytest.fixture
def rows_of(tmp_path: Path):
    """The rows of a task over a file with these bytes, or that this writes."""

    def rows_of(name: str, content) -> CorpusRows:
        file = tmp_path / name
        content(file) if callable(content) else file.write_bytes(content)
        (tmp_path / "tasks.yaml").write_text(TASK.format(file=name))
        (task,) = read_declarations(tmp_path / "tasks.yaml")
        return CorpusRows(task, "train", Tasks())

    return rows_of


def found(rows: CorpusRows) -> list[tuple[str, str]]:
    return [(example.key.split("Animal: ")[1], example.answer) for example in rows]


def bad(rows: CorpusRows) -> list[tuple[int, str]]:
    return [(row.line, row.reason) for row in rows.bad_rows]


def table(**columns):
    return lambda path: pq.write_table(pa.table(columns), path)


def invalid(*texts: bytes) -> pa.Array:
    """A column of texts whose bytes nobody has checked."""
    return pa.Array.from_buffers(pa.string(), len(texts), pa.array(texts, pa.binary()).buffers())


BOTH = [("wolf", "wild"), ("cow", "tame")]
LINES = "\n".join(map(json.dumps, NONE_MISSING))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"animal,kind\nwolf,1\ncow,0\n"),
        ("a.csv", b"\xef\xbb\xbfanimal,kind\r\nwolf,1\r\ncow,0\r\n"),
        ("a.csv", "animal;kind\nwolf;1\ncow;0\n".encode("utf-16")),
        ("a.csv", "animal\tkind\nwolf\t1\ncow\t0\n".encode("utf-16-le")),
        ("a.csv", b"\n animal , kind,note\nwolf,1,caf\xe9\n\ncow,0,x\n"),
        ("a.csv", b"animal;kind;a,b,c,d\nwolf;1.0;x\ncow;0.0;x\n"),
        ("a.csv", b"animal,kind\nwolf,True\ncow,false\n"),
        ("a.csv", b"animal,kind\rwolf,1\rcow,0\r"),
        ("a.jsonl", LINES.encode("utf-8-sig")),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.jsonl", LINES.encode("utf-32-be")),
        ("a.jsonl", LINES.replace("\n", "\n\n\ufeff").encode()),
        ("a.jsonl", b'{"animal": "wolf", "kind": 1.0, "note": "caf\xe9"}\n{"animal": "cow", "kind": false, "note": NaN}'),
        ("a.json", LINES.encode()),
        ("a.json", json.dumps(NONE_MISSING).encode()),
        ("a.jsonl", json.dumps(NONE_MISSING, indent=2).encode("utf-8-sig")),
        ("a.json", ("\n" + json.dumps(NONE_MISSING, indent=2) + "\n").encode("utf-16")),
        ("a.parquet", table(animal=["wolf", "cow"], kind=[1.0, 0.0])),
        ("a.parquet", table(animal=pa.array([b"wolf", b"cow"], pa.binary()), kind=[True, False])),
        ("a.parquet", table(animal=pa.array(["wolf", "cow"]).dictionary_encode(), kind=[b"1", b"0"])),
        ("a.parquet", table(animal=["wolf", "cow"], kind=[1, 0], note=invalid(b"caf\xe9", b"x"))),
        ("a.parquet", table(animal=["wolf", "cow"], kind=[1, 0], seen=pa.array([2**40, 0], pa.timestamp("s")))),
    ],
)
def test_every_way_of_writing_the_same_rows_gives_them(rows_of, name, content):
    rows = rows_of(name, content)
    assert (found(rows), bad(rows)) == (BOTH, [])


@pytest.mark.parametrize(
    ("name", "content", "reasons"),
    [
        (
            "a.jsonl",
            b'{"animal": NaN, "kind": 1}\n{"animal": -Infinity, "kind": 1}\n{"animal": null, "kind": 1}\n'
            b'{"animal": "cow", "kind": NaN}\n{"animal": "cow", "kind": 1e999}\n',
            [*((n, "column animal is missing") for n in (1, 2, 3)), *((n, "column kind is missing") for n in (4, 5))],
        ),
        ("a.parquet", table(animal=[float("nan"), None], kind=[1, 1]), [(n, "column animal is missing") for n in (1, 2)]),
        (
            "a.jsonl",
            b'{"animal": true, "kind": 1}\n{"animal": ["cow"], "kind": 1}\n{"animal": {"of": NaN}, "kind": 1}\n'
            b'{"animal": "cow", "kind": 0.5}\n{"animal": "cow", "kind": "yes"}\n',
            [
                (1, "animal is the boolean true, not a text"),
                (2, "animal is ['cow'], not a text"),
                (3, "animal is {'of': nan}, not a text"),
                (4, "kind is '0.5', not one of 0, 1"),
                (5, "kind is 'yes', not one of 0, 1"),
            ],
        ),
        (
            "a.jsonl",
            b'{"animal": "cow", "kind": 0, "id": %s}\n{"animal": "cow", "kind": 0, "m": %s}\n[1]\n'
            % (b"9" * 5000, b"[" * 100_000 + b"]" * 100_000),
            [
                (1, "JSON that cannot be read: Exceeds the limit"),
                (2, "JSON that is nested too deep"),
                (3, "an array, not a JSON object: write one JSON object a line"),
            ],
        ),
        ("a.csv", b"animal,kind\ncaf\xe9,1\n", [(2, "animal is not UTF-8 at byte 3")]),
        (
            "a.jsonl",
            b'{"m": "caf\xe9", "animal": "caf\xc3\xa9 cr\xe8me", "kind": 1}\n{"animal": "cow", "kind": "\xe9"}',
            [(1, "animal is not UTF-8 at byte 8"), (2, "kind is not UTF-8 at byte 0")],
        ),
        ("a.csv", b'animal,kind\n"cow"s,1\n', [(2, "not CSV: ',' expected after '\"'")]),
        ("a.csv", b"name,kind\ncow,1\n", [(2, "column animal is missing")]),
        ("a.csv", b"animal,kind\n,1\ncow,\n", [(2, "animal is empty"), (3, "kind is empty")]),
        ("a.parquet", table(animal=invalid(b"caf\xe9"), kind=[1]), [(1, "animal is not UTF-8 at byte 3")]),
        (
            "a.parquet",
            table(animal=pa.array([2**40], pa.timestamp("s")), kind=[1]),
            [(1, "animal cannot be read: date value out of range")],
        ),
        ("a.parquet", table(animal=[b"caf\xe9"], kind=[1]), [(1, "animal is not UTF-8 at byte 3")]),
    ],
)
def test_a_row_that_cannot_be_read_rightly_is_bad_with_its_line_column_and_reason(rows_of, name, content, reasons):
    rows = rows_of(name, content)
    assert found(rows) == []
    assert [line for line, _ in bad(rows)] == [line for line, _ in reasons]
    for (_, reason), (_, expected) in zip(bad(rows), reasons, strict=True):
        assert reason.startswith(expected)
    with pytest.raises(TaskError) as error:
        load_corpus(rows.task, "train", Tasks())
    line, reason = reasons[0]
    assert f"no usable row in {rows.source}: of {len(reasons)} bad rows, the first is " in str(error.value)
    assert f"{name}:{line}: {reason}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b'animal,kind\ncow,0\n"wolf,1\ncow,0\ncow,0\n', r"the row of lines 3 to 5: unexpected end .*line 3"),
        ("a.csv", b'animal,kind\n"wolf,1\ncow,0\n"cow,0\ncow,0\n', r"the row of lines 2 to 4: .*line 2"),
        ("a.csv", b"wolf,1\ncow,0\n", "none of the columns animal, kind: its header is 'wolf, 1'"),
        ("a.csv", b"animal|kind\nwolf|1\n", r"its header is 'animal\|kind'"),
        ("a.csv", b"animal,kind,animal\nwolf,1,cow\n", "names the column animal twice"),
        ("a.csv", "animal,kind\nwolf,1\n".encode("utf-16") + b"\x00", "truncated data"),
        ("a.csv", b"\n\n", "it is empty"),
        ("a.json", b'[{"animal": "wolf", "kind": 1},\n {"animal": "cow" "kind": 0}]', "line 2: not JSON: Expecting ','"),
        ("a.json", b'[{"animal": "wolf", "kind": 1}', r"line 1: not JSON: Expecting ',' or '\]'"),
        ("a.json", b'[{"animal": "wolf", "kind": 1}]\n{}', "line 2: not JSON: Extra data behind the array"),
        ("a.json", b'[\n{"animal": %s}]' % (b"[" * 100_000), "line 2: JSON that is nested too deep"),
        ("a.jsonl", b"[1]\n" + LINES.encode(), "line 2: not JSON: Extra data .*write one JSON object a line"),
        ("a.json", b"[]", "it is empty"),
        ("a.parquet", b"PAR1", "cannot read .*a.parquet: "),
        ("a.parquet", table(name=["wolf"]), "none of the columns animal, kind: it has 'name'"),
        ("a.jsonl", lambda path: os.mkfifo(path), "no plain file"),
        ("a.jsonl", lambda path: path.mkdir(), "no plain file"),
        ("a.jsonl.gz", gzip.compress(LINES.encode()), "of no known kind"),
    ],
)
def test_a_file_of_which_no_row_can_be_trusted_is_one_error(rows_of, name, content, said):
    rows = rows_of(name, content)
    with pytest.raises(TaskError, match=said):
        load_corpus(rows.task, "train", Tasks())


def test_a_quoted_cell_may_hold_lines_quotes_and_a_great_deal(rows_of):
    long = "wolf " * 200_000
    rows = rows_of("a.csv", f'animal,kind\n"a ""wolf"",\nold",1\n{long},1\ncow\n'.encode())
    assert found(rows) == [('a "wolf",\nold', "wild"), (long.strip(), "wild")]
    # Named by the line that the row begins on.
    assert bad(rows) == [(5, "column kind is missing")]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_a_row_that_is_too_long_is_not_taken(rows_of, name):
    long = "w" * (ROW_BOUND + 1)
    if name == "a.csv":
        with pytest.raises(TaskError, match=f"line 3: the row is longer than {ROW_BOUND} characters"):
            found(rows_of(name, f"animal,kind\nwolf,1\n{long},1\n".encode()))
        return
    if name == "a.jsonl":
        lines = [LINES, json.dumps({"animal": long, "kind": 1}), LINES]
        rows = rows_of(name, "\n".join(lines).encode())
    else:
        rows = rows_of(name, table(animal=["wolf", "cow", long, "wolf", "cow"], kind=[1, 0, 1, 1, 0]))
    assert found(rows) == BOTH + BOTH
    ((line, reason),) = bad(rows)
    assert line == 3 and reason.startswith(f"longer than {ROW_BOUND}")


def test_a_message_holds_a_piece_of_a_long_value(rows_of):
    rows = rows_of("a.jsonl", json.dumps({"animal": "cow", "kind": "x" * 100_000}).encode())
    assert found(rows) == []
    ((_, reason),) = bad(rows)
    assert len(reason) < 200


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff"), max_size=20)


@settings(deadline=None)
@given(
    st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8),
    st.sampled_from(",;\t"),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_whatever_csv_writes_is_read(rows, delimiter, encoding, quoting):
    with TemporaryDirectory() as folder:
        file = Path(folder) / "a.csv"
        with file.open("w", encoding=encoding, newline="") as opened:
            writer = csv.writer(opened, delimiter=delimiter, quoting=quoting)
            writer.writerows([("animal", "kind"), *rows])
        assert [row for _, row in read_rows(file, COLUMNS)] == [{"animal": animal, "kind": kind} for animal, kind in rows]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ROW = st.fixed_dictionaries({}, optional={"animal": JSON, "kind": JSON | st.sampled_from([0, 1, True, 1.0, "1"]), "m": JSON})
PARQUET = st.sampled_from(
    [
        pa.table({"animal": ["wolf", "cow", None] * 5, "kind": [1, 0, 1] * 5}),
        pa.table({"animal": invalid(b"caf\xe9", b"cow"), "kind": [0.0, float("nan")]}),
        pa.table({"animal": pa.array([2**40, 1], pa.timestamp("s")), "kind": [True, None]}),
        pa.table({"animal": [b"cow", b"\xff"], "kind": [datetime.date(2000, 1, 1), None]}),
        pa.table({"animal": [["cow"], []], "kind": [{"a": [1.5]}, None]}),
        pa.table({"animal": pa.array(["a", "b"]).dictionary_encode(), "kind": pa.array([1, 2], pa.float16())}),
    ]
)


def parquet(drawn: pa.Table, compression: str, use_dictionary: bool, version: str) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(drawn, sink, compression=compression, use_dictionary=use_dictionary, data_page_version=version)
    return sink.getvalue().to_pybytes()


CONTENTS = st.one_of(
    st.binary(max_size=200),
    st.lists(st.text('animl,kd;\t"\n\r wolf01', max_size=12), max_size=8).map(
        lambda lines: "\n".join(["animal,kind", *lines]).encode()
    ),
    st.lists(ROW, max_size=5).map(lambda rows: "\n".join(map(json.dumps, rows)).encode(errors="surrogatepass")),
    st.lists(ROW, max_size=5).map(lambda rows: json.dumps(rows, indent=1).encode()),
    st.builds(parquet, PARQUET, st.sampled_from(["none", "snappy", "zstd"]), st.booleans(), st.sampled_from(["1.0", "2.0"])),
)
# At a share of the file's length: cut out some bytes and put others there.
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(max_size=4)), max_size=3)


@settings(max_examples=500, deadline=None)
@given(
    CONTENTS,
    CHANGES,
    st.sampled_from(["utf-8", "utf-16", "utf-16-le"]),
    st.sampled_from([".csv", ".json", ".jsonl", ".parquet"]),
)
def test_any_bytes_give_rows_bad_rows_with_their_reason_or_one_error(content, changes, encoding, suffix):
    if content.startswith(b"PAR1"):
        suffix = ".parquet"
    elif encoding != "utf-8":
        content = content.decode(errors="replace").encode(encoding)
    for share, cut, put in changes:
        at = int(share * len(content))
        content = content[:at] + put + content[at + cut :]
    with TemporaryDirectory() as folder:
        file, declared = Path(folder) / f"a{suffix}", Path(folder) / "tasks.yaml"
        file.write_bytes(content)
        declared.write_text(TASK.format(file=file.name))
        (task,) = read_declarations(declared)
        rows = CorpusRows(task, "train", Tasks())
        try:
            examples = list(rows)
        except TaskError as error:
            assert file.name in str(error)
        else:
            "".join(example.prompt + example.answer for example in examples).encode()
    assert all(row.line >= 1 and row.reason for row in rows.bad_rows)
