"""Near rows count for more: similarities to a power, before they are summed."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from lorafleet.weighing.evidence import Evidence
from lorafleet.weighing.shares import Similar
from lorafleet.weighing.weigher import Weigher
from lorafleet.weighing.weights import TaskWeights


@dataclass(frozen=True)
class Sharp:
    """A row with another similarity."""

    task: str
    similarity: float


@dataclass(frozen=True)
class Sharpened:
    """Asks a weigher about rows whose similarities were taken to a power; those below 0 count as 0.

    Without it (a power of 1, as in arXiv 2602.21222) a hundred rows that are all somewhat near say little of the few that
    are nearest.

    Attributes:
        power: above 0.
    """

    weigher: Weigher
    power: float

    def weigh(self, neighbours: Iterable[Similar], among: Collection[str] | None = None) -> TaskWeights:
        """The weigher's weights, and the shares that it saw."""
        rows = sharpened(neighbours, self.power)
        return self.weigher.weigh(replace(neighbours, neighbours=rows) if isinstance(neighbours, Evidence) else rows, among)


def sharpened(neighbours: Iterable[Similar], power: float) -> list[Sharp]:
    """Rows with their similarities, as parts of the largest one, to a power: none vanishes because all are small."""
    rows = list(neighbours)
    largest = max((row.similarity for row in rows), default=0.0)
    return [Sharp(row.task, (row.similarity / largest) ** power if row.similarity > 0 else 0.0) for row in rows]
