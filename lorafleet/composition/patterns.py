"""The keys of PEFT's alpha_pattern and rank_pattern, which are regular expressions for the names of modules.

PEFT runs every key on every name with `re`, which takes exponential time for `(.+)+!`. RE2 takes time that is linear in the
name, and refuses what needs more (back references, lookarounds).
"""

import re
from collections.abc import Iterable
from typing import Any

MOST_PATTERNS = 64
"""Keys that are not plain names; there may be a plain name for every module."""
LONGEST_KEY = 256
COMPILED_BYTES = 1 << 15
"""What RE2 may take for a key: repetitions of repetitions become large programs."""

_PLAIN = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)


class PatternError(ValueError):
    """A key is no regular expression of RE2's, or there are too many."""


class Patterns:
    """The keys of one field, in their order.

    Raises:
        PatternError: RE2 does not take a key, a key is too long, or there are too many.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = tuple(keys)
        self._plain = {key: number for number, key in enumerate(self._keys) if _PLAIN.fullmatch(key)}
        others = {number: key for number, key in enumerate(self._keys) if key not in self._plain}
        if len(others) > MOST_PATTERNS:
            raise PatternError(f"it has {len(others)} keys with regular expressions. Allowed: {MOST_PATTERNS}")
        self._compiled = {number: _compiled(key) for number, key in others.items()}

    def key_for(self, module: str) -> str | None:
        """The first key that matches a module's name or the end of it behind a dot, as PEFT's `get_pattern_key`."""
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", module))] if self._plain else []
        found = min((self._plain[module[start:]] for start in starts if module[start:] in self._plain), default=None)
        for number, pattern in self._compiled.items():
            if found is not None and number > found:
                break
            if pattern.match(module):
                return self._keys[number]
        return None if found is None else self._keys[found]


def _compiled(key: str) -> Any:
    # Not above: most adapters have no patterns, and need no RE2.
    import re2

    if len(key) > LONGEST_KEY:
        raise PatternError(f"it has {len(key)} characters. Allowed: {LONGEST_KEY}")
    options = re2.Options()
    options.max_mem, options.log_errors = COMPILED_BYTES, False
    try:
        return re2.compile(rf"(.*\.)?({key})$", options=options)
    except re2.error as error:
        (reason,) = error.args
        raise PatternError(reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)) from None
