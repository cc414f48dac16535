"""A row of the index, and what identifies it."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A text to be written, for all rows of its task that have it.

    Attributes:
        identifier: as `row_identifiers` gives it.
        text: the example's key, for people; the text that was embedded follows from it.
    """

    identifier: str
    task: str
    text: str


def text_digest(texts: str | Sequence[str]) -> str:
    """The digest of an embedded text, or of the texts that a vector is the mean of.

    It has 80 bits, so that of ten million texts no two are likely to share it (odds of 4e-11). The mean of equal texts is
    that text.
    """
    several = (texts,) if isinstance(texts, str) else tuple(texts)
    alike = several[:1] if len(set(several)) == 1 else several
    return hashlib.sha256("\0".join(alike).encode()).hexdigest()[:20]


def row_identifiers(task: str, texts: Iterable[str | Sequence[str]]) -> list[str]:
    """The identifier of every row of a corpus, in order: task, digest of what is embedded, and how many rows have that.

    A text may stand twice in a corpus, with two answers: both rows have the same identifier, and it counts them.
    """
    digests = [text_digest(one) for one in texts]
    copies = Counter(digests)
    return [identifier_of(task, digest, copies[digest]) for digest in digests]


def identifier_of(task: str, digest: str, copies: int) -> str:
    """The identifier of rows of a task with the same text."""
    return f"{task}-{digest}-{copies}"


def task_of(identifier: str) -> str:
    """The task of an identifier."""
    return identifier.rsplit("-", 2)[0]


def digest_of(identifier: str) -> str:
    """The digest of an identifier's text."""
    return identifier.rsplit("-", 2)[1]


def copies_of(identifier: str) -> int:
    """The number of rows that an identifier stands for."""
    return int(identifier.rsplit("-", 2)[2])
