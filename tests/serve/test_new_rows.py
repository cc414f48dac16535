"""The rows that come with an adapter, from a file: read by the same readers as corpora, and as strictly bounded."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorafleet.config import Settings, load_settings
from serve.admission import read_new_rows
from serve.errors import ApiError
from serve.protocol.requests import AdapterRequest


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = load_settings(state=tmp_path, serving={"adapter_mib": 1, "adapter_rows": 2000})
    settings.adapter_roots[0].mkdir(parents=True)
    return settings


@pytest.fixture
def keys(settings: Settings):
    """The keys of the rows of a file that has these bytes, or a table's."""

    def keys(name: str, content: bytes | pa.Table, task: str = "seas") -> list[str]:
        file = settings.adapter_roots[0] / name
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            pq.write_table(content, file, compression="zstd", store_schema=False)
        request = AdapterRequest(name="seas", task=task, source="/nowhere", corpus=str(file))
        return [row.key for row in read_new_rows(request, settings)]

    return keys


PIQA = {"goal": "Open a door", "sol1": "Push it.", "sol2": "Paint it.", "label": 0.0}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "id;text\n1;How deep?\n2;Whales sing.\n".encode("utf-16")),
        ("a.json", b'[{"text": "How deep?", "id": NaN}, {"text": "Whales sing.", "note": "caf\xe9"}]'),
        ("a.parquet", pa.table({"text": [b"How deep?", b"Whales sing."], "at": pa.array([2**40, 1], pa.timestamp("s"))})),
    ],
)
def test_of_a_task_that_nobody_declares_the_text_alone_is_read(keys, name, content):
    assert keys(name, content) == ["How deep?", "Whales sing."]


def test_of_a_declared_task_its_columns_alone_are_read_or_a_text(keys):
    (key,) = keys("a.jsonl", json.dumps({**PIQA, "note": float("nan")}).encode(), "piqa")
    assert key.endswith("\nGoal: Open a door")
    (key,) = keys("a.parquet", pa.table({"text": ["How deep?"], "note": [1]}), "piqa")
    assert key == "How deep?"


@pytest.mark.parametrize(
    ("name", "content", "param", "said"),
    [
        ("a.csv", b'text\n"How deep?\nWhales\n', "corpus", "the row of lines 2 to 3"),
        ("a.csv", b"name,kind\nwolf,1\n", "corpus", "none of the columns text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": NaN}\n', "corpus.2", "column text is missing"),
        ("a.jsonl", b'{"text": true}\n', "corpus.1", "text is the boolean true"),
        ("a.jsonl", b'{"text": 1.5}\n', "corpus.1", "text is a number"),
        ("a.jsonl", b'{"text": ["a"]}\n', "corpus.1", "not a text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "corpus.2", "text is not UTF-8"),
        ("a.jsonl", b'{"text": "a", "m": %s}' % (b"[" * 100_000), "corpus.1", "nested too deep"),
        ("a.jsonl", b'{"text": "a", "id": %s}' % (b"9" * 5000), "corpus.1", "JSON that cannot be read"),
        ("a.parquet", pa.table({"text": pa.array([2**40], pa.timestamp("s"))}), "corpus.1", "text cannot be read"),
        ("a.jsonl", b'{"text": "a"}\n' * 100_000, "corpus", "1048576 bytes (serving.adapter_mib)"),
        (
            "a.parquet",
            pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0] * 1500, pa.int32()), ["a" * 1000])}),
            "corpus",
            "decodes to more than 1048576 bytes (serving.adapter_mib)",
        ),
    ],
)
def test_a_file_that_is_no_good_is_one_400_that_names_the_row(keys, name, content, param, said):
    with pytest.raises(ApiError) as error:
        keys(name, content)
    assert (error.value.status, error.value.param) == (400, param)
    assert said in error.value.message and "\n" not in error.value.message
