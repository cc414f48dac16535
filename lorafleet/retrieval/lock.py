"""One process at a time, by a file that the system locks: the lock goes with its process, however that ends."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from lorafleet.errors import IndexUnavailable, SettingsError
from lorafleet.storage import OTHER_STATE, READABLE

LOOK_SECONDS = 0.05
INDEXING = ".embed.lock"


@contextmanager
def one_at_a_time(path: Path, patience: float, problem: str, mend: str) -> Iterator[None]:
    """Hold the lock of a file while the block runs; wait for it up to `patience` seconds.

    Raises:
        IndexUnavailable: `problem`, with `mend`: another process holds it for longer.
        SettingsError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, READABLE)
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}", OTHER_STATE) from None
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise IndexUnavailable(problem, mend) from None
                time.sleep(LOOK_SECONDS)
        yield
    finally:
        os.close(descriptor)


def indexing(state: Path) -> AbstractContextManager[None]:
    """Held by whoever fills the next version of the index: two would take up each other's rows.

    Raises:
        IndexUnavailable: another process does so already.
    """
    return one_at_a_time(state / INDEXING, 0, "another run indexes corpora into this state", "Wait for its end")
