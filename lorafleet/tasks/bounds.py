"""Bounds of row files: the bytes that a file decodes to, and the size of one row."""

from dataclasses import dataclass
from pathlib import Path

from lorafleet.errors import TaskError

ROW_BOUND = 2**24
"""Of one row: characters of text, or bytes of Parquet."""


@dataclass(frozen=True)
class ByteLimit:
    """The most bytes that a file may decode to, and the setting that says so."""

    count: int
    setting: str = ""

    def __str__(self) -> str:
        return f"{self.count} bytes" + (f" ({self.setting})" if self.setting else "")


class Decoded:
    """Counts what a file has been decoded to."""

    def __init__(self, path: Path, limit: ByteLimit) -> None:
        self._path, self._limit = path, limit
        self.count = 0

    def add(self, count: int) -> None:
        """Count bytes.

        Raises:
            TaskError: the sum is beyond the limit.
        """
        self.count += count
        self.check(self.count)

    def check(self, count: int) -> None:
        """Refuse a count beyond the limit.

        Raises:
            TaskError: it is.
        """
        if count > self._limit.count:
            raise TaskError(f"{self._path} decodes to more than {self._limit}", "Write it as several files")
