"""Predictions as files: one Parquet file for each method, setting and task, beside one with the task's rows.

What is kept is enough to compute every table again, under any scoring, without a model.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorafleet.errors import SettingsError
from lorafleet.evaluation.answering import Answer
from lorafleet.evaluation.under_test import Setting
from lorafleet.storage import file_in_one_step
from lorafleet.tasks import Example, Split

SCHEMA = 1
ABOUT = b"lorafleet"
MOST_RANKED = 8

ROW_COLUMNS = pa.schema(
    {
        "id": pa.string(),
        "task": pa.string(),
        "text": pa.string(),
        "options": pa.list_(pa.string()),
        "answers": pa.list_(pa.string()),
    }
)
OPTION = pa.struct({"total": pa.float64(), "tokens": pa.int32(), "bytes": pa.int32()})
PREDICTION_COLUMNS = pa.schema(
    {
        "id": pa.string(),
        "task": pa.string(),
        "setting": pa.string(),
        "method": pa.string(),
        "combined_by": pa.string(),
        "weights": pa.map_(pa.string(), pa.float64()),
        "options": pa.list_(OPTION),
        "text": pa.string(),
        "ranked": pa.list_(pa.string()),
    }
)
RETRIEVAL_COLUMNS = pa.schema(
    {"id": pa.string(), "task": pa.string(), "ranked": pa.list_(pa.string()), "shares": pa.list_(pa.float64())}
)


@dataclass(frozen=True, order=True)
class Part:
    """What is measured and kept in one piece: a method on the rows of a task, in a setting.

    Attributes:
        split: which rows; "train" also where it is to choose how options are compared.
    """

    task: str
    setting: Setting
    method: str
    split: Split = "evaluation"

    def path(self, folder: Path) -> Path:
        """Its file below the folder of the results."""
        return split_folder(folder, self.split) / "predictions" / self.setting / self.method / f"{self.task}.parquet"

    def __str__(self) -> str:
        which = "" if self.split == "evaluation" else f", {self.split} rows"
        return f"{self.task}, {self.method}, {self.setting}{which}"


def split_folder(folder: Path, split: Split) -> Path:
    """Where predictions for a split and its rows are kept: those of evaluation rows in the folder of the results itself."""
    return folder if split == "evaluation" else folder / split


def row_ids(examples: Sequence[Example]) -> list[str]:
    """An identifier of every row, the same whatever rows stand beside it; a row that comes again has a number."""
    seen: dict[str, int] = {}
    identifiers = []
    for example in examples:
        digest = hashlib.sha256("\0".join((example.prompt, *example.options)).encode()).hexdigest()[:16]
        number = seen[digest] = seen.get(digest, -1) + 1
        identifiers.append(f"{digest}-{number}" if number else digest)
    return identifiers


def write_rows(path: Path, task: str, texts: Sequence[str], examples: Sequence[Example], about: Mapping[str, Any]) -> None:
    """Keep the rows of a task, so that a report needs no corpus.

    Args:
        texts: of each row, without instruction.
    """
    rows = [
        {"id": name, "task": task, "text": text, "options": list(example.options), "answers": list(example.answers)}
        for name, text, example in zip(row_ids(examples), texts, examples, strict=True)
    ]
    _write(path, pa.Table.from_pylist(rows, ROW_COLUMNS), about)


def write_predictions(
    path: Path,
    part: Part,
    examples: Sequence[Example],
    answers: Sequence[Answer],
    ranked: Sequence[Sequence[str]],
    about: Mapping[str, Any],
) -> None:
    """Keep a part's answers.

    Args:
        ranked: of each row, the tasks of its neighbours, the heaviest first.
        about: what the file says of itself; `fingerprint` tells whether it is current.
    """
    rows = [
        {
            "id": name,
            "task": part.task,
            "setting": part.setting,
            "method": part.method,
            "combined_by": answer.composition.method,
            "weights": list(answer.composition.weights.items()),
            "options": [{"total": o.total, "tokens": o.tokens, "bytes": o.bytes} for o in answer.options],
            "text": answer.text,
            "ranked": list(tasks)[:MOST_RANKED],
        }
        for name, answer, tasks in zip(row_ids(examples), answers, ranked, strict=True)
    ]
    _write(path, pa.Table.from_pylist(rows, PREDICTION_COLUMNS), about)


def write_retrieval(path: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Keep which tasks' rows were found for each query: id, task, and all tasks with their shares, the heaviest first."""
    _write(path, pa.Table.from_pylist(list(rows), RETRIEVAL_COLUMNS), about)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that was written here.

    Raises:
        SettingsError: it is damaged.
    """
    with _readable(path):
        found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def about(path: Path) -> dict[str, Any]:
    """What a file says of itself; empty where there is none, or none of ours."""
    if not path.is_file():
        return {}
    try:
        metadata = pq.read_metadata(path).metadata or {}
        found: dict[str, Any] = json.loads(metadata.get(ABOUT, b"{}"))
    except (OSError, ValueError, pa.ArrowException):
        return {}
    return found


def is_current(path: Path, fingerprint: str) -> bool:
    """Whether a file holds what would be computed now."""
    return about(path).get("fingerprint") == fingerprint


def digest(*described: Any) -> str:
    """A fingerprint of anything that JSON can say."""
    return hashlib.sha256(json.dumps([SCHEMA, *described], sort_keys=True, default=str).encode()).hexdigest()[:24]


def _write(path: Path, table: pa.Table, about: Mapping[str, Any]) -> None:
    with file_in_one_step(path) as file:
        pq.write_table(table.replace_schema_metadata({ABOUT: json.dumps(about, default=str)}), file, compression="zstd")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        raise SettingsError(f"cannot read {path}: {error}", "Delete it, and run the evaluation again") from None
