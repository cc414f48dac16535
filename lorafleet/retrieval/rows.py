"""A row of the index, and what identifies it."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A row to be written.

    Attributes:
        identifier: as `row_identifiers` gives it.
        text: the example's key, the text that was embedded.
    """

    identifier: str
    task: str
    text: str


def key_digest(key: str) -> str:
    """What identifies a key: 80 bits, so that of ten million keys no two are likely to share it (odds of 4e-11)."""
    return hashlib.sha256(key.encode()).hexdigest()[:20]


def row_identifiers(task: str, keys: Iterable[str]) -> list[str]:
    """One identifier for every key of a corpus, in order: task, digest of the key, and how often it came before.

    A key may stand twice in a corpus, with two answers; both rows count when neighbours are weighed.
    """
    seen: Counter[str] = Counter()
    identifiers = []
    for key in keys:
        digest = key_digest(key)
        identifiers.append(f"{task}-{digest}-{seen[digest]}")
        seen[digest] += 1
    return identifiers


def task_of(identifier: str) -> str:
    """The task of a row's identifier."""
    return identifier.rsplit("-", 2)[0]
