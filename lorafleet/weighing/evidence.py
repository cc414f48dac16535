"""What is known of a query when its tasks are weighed."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from lorafleet.weighing.prototypes import NearPrototype, Prototypes, Vectors
from lorafleet.weighing.router import Router
from lorafleet.weighing.shares import Similar


@dataclass(frozen=True)
class Evidence:
    """The rows near a query, which it iterates over, and where the query itself lies.

    Attributes:
        embedding: float32 [dimensions], the query's own.
        prototypes: those of the index.
        router: the one that has learned from it, where there is one.
    """

    neighbours: Sequence[Similar]
    embedding: Vectors | None = None
    prototypes: Prototypes | None = None
    router: Router | None = None

    @classmethod
    def of(cls, neighbours: Iterable[Similar]) -> "Evidence":
        """These neighbours as evidence; more than they are, where they come with more."""
        return neighbours if isinstance(neighbours, cls) else cls(list(neighbours))

    def __iter__(self) -> Iterator[Similar]:
        return iter(self.neighbours)

    def nearest(self, count: int, among: Collection[str] | None = None) -> list[NearPrototype]:
        """The tasks whose prototypes are nearest to the query; none where there are no prototypes.

        Args:
            among: only these tasks count; all where absent.
        """
        if self.embedding is None or self.prototypes is None:
            return []
        return self.prototypes.nearest(self.embedding, count, among)
