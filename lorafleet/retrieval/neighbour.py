"""A row that a search found."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Neighbour:
    """A row near a query; `similarity` is the cosine of the two embeddings."""

    task: str
    text: str
    similarity: float
