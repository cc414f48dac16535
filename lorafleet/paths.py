"""Paths in settings, made absolute: Ray's workers and replicas have other working directories.

A relative path starts from the working directory of the command, or from the folder that the caller names. `~` is the home
folder. Links to files stay links, since their targets may be replaced or have other names.
"""

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from lorafleet.errors import SettingsError
from lorafleet.home import expanded
from lorafleet.storage import file_mode

PACKAGE = "package:"
MODEL = "a model: a hub id, a path, or package:NAME/PATH"
"""Marks a field of settings as a reference to a model."""
RAY_WORKING_DIRECTORIES = "runtime_resources/working_dir_files"
CARRIED = frozenset({"tasks.hub_root", "tasks.declarations"})
"""Settings that may name files of a job's own working directory. Other paths outlive the job."""
HINTS = {
    "state": "Give an absolute folder: --state DIR, or LORAFLEET_STATE in the environment of 'ray start'",
    "evaluation.folder": "Give an absolute folder, or none: then it is the state folder's evaluation/",
}
Section = TypeVar("Section", bound=BaseModel)


def with_absolute_paths(section: Section, folder: Path, prefix: str = "") -> Section:
    """The same settings with every `Path`, and every model that is a path, absolute.

    Args:
        folder: where relative paths start.
        prefix: the dotted name of the section, with a dot at its end.

    Raises:
        SettingsError: a path cannot be made absolute, or a job's working directory would lose it.
    """
    changed = {}
    for name, field in type(section).model_fields.items():
        make = absolute_model if MODEL in field.metadata else absolute
        changed[name] = _walked(getattr(section, name), folder, prefix + name, make)
    return section.model_copy(update=changed)


def absolute(path: str | Path, folder: Path, setting: str) -> Path:
    """A path from the root, with links to folders followed.

    Raises:
        SettingsError: it is not UTF-8, holds a null byte, follows links in a circle, or there is no such home folder.
    """
    whole = _placed(path, folder, setting)
    return whole.resolve() if stat.S_ISDIR(file_mode(whole)) else whole


def absolute_model(reference: str, folder: Path, setting: str) -> str:
    """A model's path from the root; a hub id or a package's model as it is."""
    if reference.startswith(PACKAGE):
        return reference
    path = _placed(reference, folder, setting)
    mode = file_mode(path)
    local = stat.S_ISDIR(mode) or (path.suffix == ".gguf" and stat.S_ISREG(mode))
    # The name stays, also of a link: adapters are named after it, and blobs in the hub's cache have no .gguf.
    return str(path) if local or reference.startswith((".", "/", "~")) else reference


def is_relative(path: Path) -> bool:
    """Whether a path depends on a working directory."""
    return not path.is_absolute() and not str(path).startswith("~")


def working_directory() -> Path:
    """The working directory.

    Raises:
        SettingsError: it was deleted.
    """
    try:
        return Path.cwd()
    except OSError:
        raise SettingsError("the working directory does not exist any more", "Change to one that does") from None


def _walked(value: Any, folder: Path, setting: str, make: Callable[[Any, Path, str], Any]) -> Any:
    if isinstance(value, BaseModel):
        return with_absolute_paths(value, folder, f"{setting}.")
    if isinstance(value, (list, tuple)):
        return type(value)(_walked(one, folder, setting, make) for one in value)
    if isinstance(value, dict):
        return {key: _walked(one, folder, setting, make) for key, one in value.items()}
    if not isinstance(value, Path) and (make is not absolute_model or value is None):
        return value
    if isinstance(value, Path) and is_relative(value) and setting not in CARRIED and RAY_WORKING_DIRECTORIES in str(folder):
        raise SettingsError(
            f"{setting} = {value} is relative, and a job's working directory is a copy that Ray deletes",
            HINTS.get(setting, "Give an absolute path"),
        )
    return make(value, folder, setting)


def _placed(path: str | Path, folder: Path, setting: str) -> Path:
    if "\0" in str(path):
        raise SettingsError(f"bad value for {setting}: {str(path)!r}", "Allowed: a path without null bytes")
    try:
        str(path).encode()
        whole = folder / expanded(path)
        return whole.resolve() if whole.name == ".." else whole.parent.resolve() / whole.name
    except UnicodeEncodeError:
        why = "a path in UTF-8"
    except RuntimeError as error:
        # No home folder, or links in a circle.
        why = f"a path that can be followed ({error})"
    raise SettingsError(f"bad value for {setting}: {str(path)!r}", f"Allowed: {why}")
