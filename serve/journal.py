"""The change of the pool that is under way, on disk: whoever starts after a crash knows what to undo or to finish."""

import fcntl
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter

from lorafleet.errors import AdapterError
from lorafleet.storage import READABLE, read_json, write_json

JOURNAL = ".change.json"
LOCK = ".pool.lock"
LOCK_SECONDS = 90.0
LOCK_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Change:
    """An adapter that comes in or goes.

    Attributes:
        rows: whether rows of its task go from the index, when an add is undone or a removal is finished.
    """

    action: Literal["add", "remove"]
    name: str
    task: str
    rows: bool

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)


_CHANGE = TypeAdapter(Change)


class Journal:
    """The change under way in a folder of adapters; there is one at most.

    Args:
        folder: of all adapters; those on their way lie in it under names that begin with a dot.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / JOURNAL

    def lock(self) -> None:
        """Wait until no other process writes here; the lock goes with this process, however it ends.

        Raises:
            AdapterError: one does so for longer than a pool that is being replaced.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT, READABLE)
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise AdapterError(
                        f"another endpoint serves the adapters in {self._folder}", "End that one, or give another state"
                    ) from None
                time.sleep(LOCK_LOOK_SECONDS)
            else:
                return

    def begin(self, change: Change) -> None:
        """Write down what is going to be done."""
        write_json(self._path, asdict(change))

    def read(self) -> Change | None:
        """The change that was begun and not ended.

        Raises:
            AdapterError: its file cannot be read.
        """
        try:
            data = read_json(self._path)
            return None if data is None else _CHANGE.validate_json(json.dumps(data))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it holds no change of the pool"
            raise AdapterError(
                f"cannot read {self._path}: {reason}",
                "It tells of an adapter that was being added or removed. Delete it and the folders .incoming-* and "
                ".leaving-* next to it, then see with lorafleet adapters which one is missing or still there",
            ) from None

    def end(self) -> None:
        """It is done, or undone."""
        self._path.unlink(missing_ok=True)

    def place(self, name: str) -> Path:
        """Where an adapter of the fleet lies."""
        return self._folder / name

    def incoming(self, name: str) -> Path:
        """Where an adapter lies that comes in."""
        return self._folder / f".incoming-{name}"

    def leaving(self, name: str) -> Path:
        """Where an adapter lies that goes."""
        return self._folder / f".leaving-{name}"

    def sweep(self) -> None:
        """Delete what is on its way."""
        for folder in [*self._folder.glob(".incoming-*"), *self._folder.glob(".leaving-*")]:
            shutil.rmtree(folder)
