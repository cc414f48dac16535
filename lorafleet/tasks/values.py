"""Values of a row's columns as texts and names; a value that is missing, or no text, is refused."""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from numbers import Real
from typing import Any

import numpy as np

from lorafleet.errors import shown

WHOLE_NUMBER = re.compile(r"([+-]?\d+)\.0+")
BOOLEANS = {"true": "1", "false": "0"}


class BadRowError(ValueError):
    """A row does not fit its task; the message says why."""


Row = dict[str, Any]
NumberedRow = tuple[int, Row | BadRowError]
"""A row or its fault, with the line that it begins on."""


def is_missing(value: Any) -> bool:
    """Whether a value is none: null, or NaN or an infinity, which pandas and Python's JSON write for it."""
    return value is None or (isinstance(value, Real) and not _is_finite(value))


def is_list(value: Any) -> bool:
    """Whether a column holds several values, in a list or an array; a text is one, not as many as it has characters."""
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def scalar(value: Any, column: str) -> Any:
    """A value that a text can hold: a text without the blanks around it, also from bytes; a number or date as it is.

    Raises:
        BadRowError: it is missing, empty, a boolean, a list or a mapping, or its bytes are not UTF-8.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise BadRowError(f"{column} is not UTF-8 at byte {error.start}") from None
    if isinstance(value, str):
        value = value.strip()
        if not value:
            raise BadRowError(f"{column} is empty")
        return value
    if is_missing(value):
        raise BadRowError(f"column {column} is missing")
    if isinstance(value, bool | np.bool_):
        raise BadRowError(f"{column} is the boolean {str(value).lower()}, not a text")
    if isinstance(value, Mapping) or is_list(value):
        raise BadRowError(f"{column} is {shown(value)}, not a text")
    return value


def as_text(value: Any, column: str) -> str:
    """A value as text.

    Raises:
        BadRowError: as `scalar`, or it is a number of too many digits.
    """
    try:
        return str(scalar(value, column)).strip()
    except BadRowError:
        raise
    except ValueError as error:
        raise BadRowError(f"{column} cannot be written as text: {error}") from None


def named(value: Any, column: str, known: Collection[str]) -> str:
    """The known name that a value means: 1.0 means 1, True means true, and 1 where there are two names.

    Raises:
        BadRowError: as `as_text`, or it means none of them.
    """
    name = str(value) if isinstance(value, bool | np.bool_) else as_text(value, column)
    names = [name]
    if whole := WHOLE_NUMBER.fullmatch(name):
        names.append(whole[1])
    if name.lower() in BOOLEANS:
        names.append(name.lower())
        if len(known) == 2:
            names.append(BOOLEANS[name.lower()])
    for candidate in names:
        if candidate in known:
            return candidate
    raise BadRowError(f"{column} is {shown(name)}, not one of {', '.join(known)}")


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        # A whole number beyond the range of floats.
        return True
