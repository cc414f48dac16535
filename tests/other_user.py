"""Commands as another user of this machine, who has no home folder and no entry in its list of users."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UID = 61_234
AS_OTHER = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
LORAFLEET = Path(sys.executable).with_name("lorafleet")


def run(*command: str | Path, umask: str = "022", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as that user, without HOME; skip where it cannot be."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv, to become another user")
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "USER", "LOGNAME", "LORAFLEET_CACHE")}
    shell = ["sh", "-c", f'umask {umask} && exec "$@"', "sh", *AS_OTHER]
    options = {"capture_output": True, "text": True, "timeout": 240, "check": False, "env": kept | environment, "cwd": "/"}
    if subprocess.run([*shell, sys.executable, "-c", "import lorafleet.cli"], **options).returncode != 0:
        pytest.skip("another user cannot run this Python")
    return subprocess.run([*shell, *command], **options)


def open_to_all(folder: Path) -> None:
    """Let every user through to a folder of pytest's."""
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
