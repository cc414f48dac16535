r"""The keys of PEFT's alpha_pattern and rank_pattern, which are regular expressions for the names of modules.

PEFT runs every key on every name with `re`, which takes exponential time for `(.+)+!`. A part of the syntax is read here:
letters, digits, `_`, `-`, `.`, `\.`, `\d`, `\w`, classes such as `[0-9]`, one of `*`, `+`, `?`, `{2}`, `{2,}`, `{2,3}`
after a single character, alternatives `q|k`, groups `(...)` and `(?:...)` with no more than `?` after them, `^` and `$`.
Repeated groups, back references and lookarounds are refused. Matching follows all positions of a name at once, as automata
do, and counts its steps.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

MOST_PATTERNS = 64
"""Keys that are not plain names; there may be a plain name for every module."""
LONGEST_KEY = 256
MOST_STEPS = 20_000_000
"""Steps that one adapter's keys may take on all its modules: some seconds."""

_PLAIN = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
_CHARACTER = re.compile(r"\\[.\-dw]|\[\^?(?:\w-\w|[\w.])+\]|[\w.-]", re.ASCII)
# Lazy or not, the same names match.
_TIMES = re.compile(r"(?:([*+?])|\{(\d{1,3})(,?)(\d{0,3})\})\??", re.ASCII)
_BOUNDS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class PatternError(ValueError):
    """A key is outside of the syntax, or there is too much to match."""


@dataclass(frozen=True)
class _Repeat:
    """A character, `least` to `most` times."""

    character: re.Pattern[str]
    least: int = 1
    most: int | None = 1


_Item: TypeAlias = "_Repeat | str | _Branches"
_Branches: TypeAlias = tuple[tuple[_Item, ...], ...]


class Patterns:
    """The keys of one field, in their order.

    Raises:
        PatternError: a key is not in the syntax above, or there are too many.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._plain: dict[str, int] = {}
        self._parsed: dict[int, _Branches] = {}
        self._keys = tuple(keys)
        self.steps = 0
        for number, key in enumerate(self._keys):
            if _PLAIN.fullmatch(key):
                self._plain[key] = number
            else:
                self._parsed[number] = _Parser(key).parse()
        if len(self._parsed) > MOST_PATTERNS:
            raise PatternError(f"it has {len(self._parsed)} keys with regular expressions. Allowed: {MOST_PATTERNS}")

    def key_for(self, module: str) -> str | None:
        """The first key that matches a module's name or the end of it behind a dot, as PEFT's `get_pattern_key`.

        Raises:
            PatternError: the names of an adapter take too many steps.
        """
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", module))] if self._keys else []
        self.steps += len(starts)
        plain = [self._plain[module[start:]] for start in starts if module[start:] in self._plain]
        found = min(plain, default=len(self._keys))
        for number, branches in self._parsed.items():
            if number > found:
                break
            if len(module) in self._ends(branches, module, set(starts)):
                return self._keys[number]
        return self._keys[found] if found < len(self._keys) else None

    def _ends(self, branches: _Branches, name: str, starts: set[int]) -> set[int]:
        """The positions after a match that begins at one of `starts`."""
        ends: set[int] = set()
        for branch in branches:
            reached = starts
            for item in branch:
                if not reached:
                    break
                self._count(len(reached))
                match item:
                    case "^":
                        reached = reached & {0}
                    case "$":
                        reached = reached & {len(name)}
                    case _Repeat():
                        reached = self._repeated(item, name, reached)
                    case tuple():
                        reached = self._ends(item, name, reached)
            ends |= reached
        return ends

    def _repeated(self, item: _Repeat, name: str, starts: set[int]) -> set[int]:
        reached: set[int] = set()
        for start in sorted(starts):
            # An earlier start has reached the positions after it.
            if item.most is None and start in reached:
                continue
            position = start
            while item.most is None or position - start <= item.most:
                if position - start >= item.least:
                    reached.add(position)
                if position == len(name) or item.character.match(name, position) is None:
                    break
                position += 1
            self._count(position - start)
        return reached

    def _count(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MOST_STEPS:
            raise PatternError(f"its keys take more than {MOST_STEPS} steps to match")


class _Parser:
    def __init__(self, key: str) -> None:
        self._key, self._position = key, 0

    def parse(self) -> _Branches:
        if len(self._key) > LONGEST_KEY:
            raise PatternError(f"it has {len(self._key)} characters. Allowed: {LONGEST_KEY}")
        branches = self._branches()
        if self._position < len(self._key):
            raise self._refusal()
        return branches

    def _branches(self) -> _Branches:
        branches: list[tuple[_Item, ...]] = []
        items: list[_Item] = []
        while self._position < len(self._key) and not self._key.startswith(")", self._position):
            if self._took("|"):
                branches.append(tuple(items))
                items = []
            elif self._took("^"):
                items.append("^")
            elif self._took("$"):
                items.append("$")
            elif self._took("(?:") or self._took("("):
                group = self._branches()
                if not self._took(")"):
                    raise self._refusal()
                items.append((*group, ()) if self._took("?") else group)
            else:
                items.append(self._character())
        return (*branches, tuple(items))

    def _character(self) -> _Repeat:
        found = _CHARACTER.match(self._key, self._position)
        if found is None:
            raise self._refusal()
        try:
            character = re.compile(found[0])
        except re.error as error:
            raise PatternError(f"{found[0]} is wrong: {error.msg}") from None
        self._position = found.end()
        times = _TIMES.match(self._key, self._position)
        if times is None:
            return _Repeat(character)
        self._position = times.end()
        sign, least, comma, most = times.groups()
        if sign:
            return _Repeat(character, *_BOUNDS[sign])
        return _Repeat(character, int(least), int(most) if most else None if comma else int(least))

    def _took(self, text: str) -> bool:
        if not self._key.startswith(text, self._position):
            return False
        self._position += len(text)
        return True

    def _refusal(self) -> PatternError:
        rest = self._key[self._position : self._position + 10]
        what = f"{rest!r} at position {self._position} is not read" if rest else "a group is not closed"
        return PatternError(what)
