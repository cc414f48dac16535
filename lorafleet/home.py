"""The home folder, and users who have none, as in containers."""

import os
from pathlib import Path

NO_HOME = "/nonexistent"
"""The home folder of users without one, as Debian names it."""


def stand_in_for_home() -> None:
    """Set HOME where this user has no home folder: Chroma and Ray Train ask for it when they are imported, and fail."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = NO_HOME


def expanded(path: str | Path) -> Path:
    """A path with `~` replaced by the home folder.

    Raises:
        RuntimeError: there is no such home folder.
    """
    whole = Path(path).expanduser()
    if str(path).startswith("~") and whole.is_relative_to(NO_HOME):
        raise RuntimeError("Could not determine home directory.")
    return whole
