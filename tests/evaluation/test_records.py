"""Damaged files of predictions, and values of a method's name that nobody can make: one error that says what to do."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorafleet.errors import SettingsError
from lorafleet.evaluation.records import read_rows
from lorafleet.evaluation.under_test import variant


@pytest.mark.parametrize(
    "column",
    [
        pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"], pa.binary()).buffers()),
        pa.array([2**40], pa.timestamp("s")),
    ],
)
def test_a_damaged_file_of_predictions_is_one_error(tmp_path, column):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(SettingsError, match=r"cannot read .*a\.parquet: .* run the evaluation again"):
        read_rows(tmp_path / "a.parquet")


@pytest.mark.parametrize("value", ["2024-13-45", "!!bool maybe", "[" * 5000])
def test_a_value_that_yaml_cannot_make_is_one_error(value):
    with pytest.raises(SettingsError, match="Write a number, a name or true"):
        variant(f"linear@p={value}")
