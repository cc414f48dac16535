"""What a page is made of: sections of notes, tables and figures, without a word about how they look."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from lorafleet.evaluation.intervals import Estimate


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        small: what stands below in small letters, such as an interval.
        shade: from -1 (worse) to 1 (better, or more); 0 for none.
        strong: whether it stands out, as the best of its row does.
    """

    text: str
    small: str = ""
    shade: float = 0.0
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Headings and rows; the first cell of a row names it.

    Attributes:
        narrow: whether headings stand upright, for many small cells.
    """

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    narrow: bool = False


@dataclass(frozen=True)
class Span:
    """A line of a figure of intervals: a name, its figure, and a remark behind it."""

    name: str
    figure: Estimate
    remark: str = ""


@dataclass(frozen=True)
class Spans:
    """Figures with their intervals on one scale.

    Attributes:
        marks: values that a thin line is drawn at, by what they are.
    """

    caption: str
    spans: Sequence[Span]
    marks: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """A figure over a setting.

    Attributes:
        points: the setting's value, and the figure there.
    """

    name: str
    points: Sequence[tuple[float, Estimate]]


@dataclass(frozen=True)
class Curves:
    """Curves over the same setting on one scale."""

    caption: str
    across: str
    curves: Sequence[Curve]


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    text: str


Block: TypeAlias = Table | Spans | Curves | Note


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """What links to it."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


def figure(found: Estimate | None, shade: float = 0.0, strong: bool = False) -> Cell:
    """A cell with a figure and its interval; a dash where there is none."""
    if found is None:
        return Cell("–")
    return Cell(f"{found.value:.1f}", interval(found), shade, strong)


def interval(found: Estimate) -> str:
    """An interval in words."""
    return f"{found.low:.1f} to {found.high:.1f}"
