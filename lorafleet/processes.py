"""Programs that run detached from this one: each has a log and a record of its process beside it.

The record carries the process id and when it was created by a clock that nobody sets: an id that the system has given to
another process since is never taken for ours, and a step of the clock loses none.
"""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from lorafleet.errors import LoRAFleetError
from lorafleet.storage import READABLE, read_json, write_json

LOG_TAIL_LINES = 3
BOOT = Path("/proc/sys/kernel/random/boot_id")


def find_program(name: str) -> str | None:
    """Where a program is that a package of this environment brings: beside this Python, else on the PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def start(name: str, command: Sequence[str], run_folder: Path, env: Mapping[str, str] | None = None) -> int:
    """Start a program in a session of its own; nothing is started where it runs already.

    Args:
        name: what it is called here; its log is `<run_folder>/<name>.log`, its record `<run_folder>/<name>.json`.
        command: the program's path, and its arguments.
        env: variables on top of this process's own.

    Returns:
        Its process id.

    Raises:
        LoRAFleetError: there is no such program, or it may not be run.
    """
    process = _recorded(name, run_folder)
    if process is not None:
        pid: int = process.pid
        return pid
    run_folder.mkdir(parents=True, exist_ok=True)
    appended = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    try:
        pid = os.posix_spawn(
            command[0],
            [*command],
            {**os.environ, **(env or {})},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(log_of(name, run_folder)), appended, READABLE),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
    except OSError as error:
        raise LoRAFleetError(f"cannot start {name} with {command[0]}: {error.strerror}") from None
    write_json(_record_of(name, run_folder), {"pid": pid, **_birth(psutil.Process(pid)), "command": [*command]})
    return pid


def running(name: str, run_folder: Path) -> bool:
    """Whether the program that was started under this name is alive."""
    return _recorded(name, run_folder) is not None


def stop(name: str, run_folder: Path, patience: float = 15) -> bool:
    """End a program and its children: asked first, killed after `patience` seconds.

    Returns:
        Whether there was anything to end.
    """
    process = _recorded(name, run_folder)
    if process is not None:
        family = [process, *process.children(recursive=True)]
        _send(family, "terminate")
        _, alive = psutil.wait_procs(family, timeout=patience)
        _send(alive, "kill")
        psutil.wait_procs(alive, timeout=patience)
    _record_of(name, run_folder).unlink(missing_ok=True)
    return process is not None


def log_of(name: str, run_folder: Path) -> Path:
    """The file that a program's output goes to."""
    return run_folder / f"{name}.log"


def last_words(name: str, run_folder: Path) -> str:
    """The last lines of a program's log, in one line."""
    try:
        text = log_of(name, run_folder).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-LOG_TAIL_LINES:])


def _recorded(name: str, run_folder: Path) -> psutil.Process | None:
    """The live process of the record; None where it has ended, or its id is another process's by now."""
    record = read_json(_record_of(name, run_folder))
    if record is None:
        return None
    try:
        process = psutil.Process(record["pid"])
        same = _birth(process).items() <= record.items()
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _birth(process: psutil.Process) -> dict[str, Any]:
    """The creation of a process: on Linux the boot of the machine, and the clock ticks since."""
    if not BOOT.is_file():
        return {"created": round(process.create_time())}
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        raise psutil.NoSuchProcess(process.pid) from None
    # The 22nd field; the second, in parentheses, may hold anything.
    return {"boot": BOOT.read_text(encoding="utf-8").strip(), "created": int(stat.rpartition(")")[2].split()[19])}


def _record_of(name: str, run_folder: Path) -> Path:
    return run_folder / f"{name}.json"


def _send(processes: Sequence[psutil.Process], signal: str) -> None:
    for process in processes:
        try:
            getattr(process, signal)()
        except psutil.NoSuchProcess:
            continue
