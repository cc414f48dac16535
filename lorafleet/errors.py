"""Every error that LoRAFleet raises on purpose.

LoRAFleetError              what went wrong, and what the reader can do about it
├── SettingsError           a setting is unknown or has a value that is not allowed
├── TaskError               a task's declaration, or the rows it asks for, cannot be used
│   └── TooManyBadRows      more rows of a corpus are damaged than the limit allows
├── ModelError              a base model or encoder cannot be found or loaded
├── IndexUnavailable        the Chroma server cannot be reached
├── IndexMismatch           the index is missing, or was made by another encoder
├── AdapterError            an adapter cannot be loaded, or is of a kind that cannot be composed
├── UnknownAdapter          no adapter of that name is in the pool
├── CompositionError        a method, weight or density is not allowed
├── RequestError            a request to the engine is not allowed
├── EngineFull              too many requests wait for the engine
├── TrainingError           an adapter could not be trained
└── KeyFileError            the API keys cannot be read or changed
"""

import difflib
import reprlib
from collections.abc import Iterable

LONGEST_SHOWN = 100
_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 80
_shortened.maxlevel = 3


class LoRAFleetError(Exception):
    """What went wrong in one sentence, and the mend in another.

    Args:
        problem: what is wrong, naming the field and the value.
        mend: what the reader can do; empty where the problem says it all.
    """

    def __init__(self, problem: str, mend: str = "") -> None:
        super().__init__(problem, mend)
        self.problem = problem
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.problem}. {self.mend}" if self.mend else self.problem


class SettingsError(LoRAFleetError):
    """A setting is unknown or has a value that is not allowed."""


class TaskError(LoRAFleetError):
    """A task's declaration, or the rows it asks for, cannot be used."""


class TooManyBadRows(TaskError):
    """More rows of a corpus are damaged than `tasks.bad_row_limit` allows."""


class ModelError(LoRAFleetError):
    """A base model or encoder cannot be found or loaded."""


class IndexUnavailable(LoRAFleetError):
    """The Chroma server cannot be reached."""


class IndexMismatch(LoRAFleetError):
    """The index is missing, empty, or was made by another encoder."""


class AdapterError(LoRAFleetError):
    """An adapter cannot be loaded, or is of a kind that cannot be composed."""


class UnknownAdapter(LoRAFleetError):
    """No adapter of that name is in the pool."""


class CompositionError(LoRAFleetError):
    """A method, weight or density is not allowed, or the adapters do not fit the method."""


class RequestError(LoRAFleetError):
    """A request to the engine is not allowed (empty prompt, too many tokens, ...).

    Args:
        field: the request's field that is at fault.
    """

    def __init__(self, problem: str, mend: str = "", field: str | None = None) -> None:
        super().__init__(problem, mend)
        self.args = (problem, mend, field)
        self.field = field


class EngineFull(LoRAFleetError):
    """Too many requests wait for the engine already, or it is closed."""


class TrainingError(LoRAFleetError):
    """An adapter could not be trained."""


class KeyFileError(LoRAFleetError):
    """The API keys cannot be read or changed."""


def shown(value: object) -> str:
    """A value as an error names it: short, and on one line."""
    text = _shortened.repr(value).replace("\n", " ")
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


def shown_name(text: str) -> str:
    """A name as an error has it: without quotes where it can be printed on a line."""
    return text[:200] if text.isprintable() else ascii(text)[:200]


def closest(name: str, known: Iterable[str]) -> str:
    """A sentence that offers the names most like `name`, or all of them where none is alike."""
    known = sorted(known)
    alike = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if alike:
        return f"Did you mean {' or '.join(alike)}?"
    return f"Known: {', '.join(known)}" if known else "There are none yet"
