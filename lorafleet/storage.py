"""Write files in one step: to a temporary name, fsynced, then renamed. A reader or a crash never meets half of one.

What is written is readable as the umask has it, so that a group can share a state folder.
"""

import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pydantic_core import from_json

from lorafleet.errors import SettingsError

READABLE = 0o666
OTHER_STATE = "Give another folder with --state, or let this user write there"


@contextmanager
def file_in_one_step(path: Path, mode: int = READABLE) -> Iterator[IO[bytes]]:
    """A file to fill; it takes the place of `path` when the block ends well, and vanishes when it does not.

    Args:
        mode: of the file from its first byte, less what the umask takes away.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_names(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any, mode: int = READABLE) -> None:
    """Write `data` as indented JSON in one step."""
    with file_in_one_step(path, mode) as file:
        file.write((json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The data of a JSON file; None where there is no such file.

    Raises:
        ValueError: it is not JSON in UTF-8, or is nested too deep.
    """
    try:
        return from_json(path.read_bytes())
    except FileNotFoundError:
        return None


@contextmanager
def folder_in_one_step(path: Path) -> Iterator[Path]:
    """A folder to fill; it takes the place of `path` when the block ends well, and vanishes when it does not."""
    temporary = _temporary(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        follow_umask(temporary)
        for file in temporary.rglob("*"):
            flush(file)
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.replace(old)
        temporary.replace(path)
        _flush_names(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush(path: Path) -> None:
    """Fsync a file, or the names in a folder: a machine that loses power finds it again."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def follow_umask(folder: Path) -> None:
    """Give everything in a folder the mode that the umask allows: safetensors writes files for their owner alone.

    The folder itself must have been made with the usual mode: it tells the umask, which can only be read by setting it.
    """
    allowed = stat.S_IMODE(folder.stat().st_mode)
    for parent, folders, files in os.walk(folder):
        for name in folders:
            _allow(Path(parent, name), allowed & 0o777)
        for name in files:
            _allow(Path(parent, name), allowed & READABLE)


def check_writable(folder: Path, setting: str, hint: str) -> None:
    """Refuse a folder in which nothing can be written, before long work begins. A missing one is not made.

    Args:
        setting: the name of the setting that names the folder.

    Raises:
        SettingsError: nothing can be written.
    """
    try:
        there = next(one for one in (folder, *folder.parents) if one.exists())
        # An attempt: file systems that are read-only, full or remote say yes to a question.
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise SettingsError(f"nothing can be written to {setting} = {folder}: {error.strerror}", hint) from None


def check_state_writable(state: Path) -> None:
    """`check_writable` for the state folder."""
    check_writable(state, "state", OTHER_STATE)


def file_mode(path: Path) -> int:
    """The mode of a file; 0 where there is nothing, or nothing that this user may see."""
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def readable(path: Path) -> None:
    """Refuse a file that cannot be opened, with the system's reason: safetensors calls every one of them missing.

    Raises:
        OSError: it cannot.
    """
    path.open("rb").close()


def _flush_names(folder: Path) -> None:
    # Some remote file systems cannot fsync a folder.
    with suppress(OSError):
        flush(folder)


def _allow(path: Path, mode: int) -> None:
    if not path.is_symlink():
        path.chmod(mode)


def _temporary(path: Path) -> Path:
    # Random: two machines that share a folder may have the same process ids.
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")
