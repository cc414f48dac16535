"""A row that a search found."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Neighbour:
    """A row near a query.

    Attributes:
        text: empty where nobody asked for it.
        similarity: the cosine of the two embeddings.
    """

    task: str
    text: str
    similarity: float
