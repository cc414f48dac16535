"""What a method is.

Every method here is linear in the weights once its adapters are prepared. For a row with activations x, the prepared
adapters i with their A_i, B_i and scales s_i, the composed adapter adds

    sum_j B_j z_j,     z_j = direct_j (A_j x) + spread_j sum_i gather_i (A_i x)

`direct` alone keeps each adapter to itself (cat); `gather` and `spread` alone are the product of two weighted sums
(linear). So a method says two things: which prepared forms of the adapters it reads, and the three coefficients of each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lorafleet.composition.adapter import LowRank
from lorafleet.composition.composition import Composition


@dataclass(frozen=True)
class Prepared:
    """How an adapter's tensors are changed before they are read; equal ones are made once and shared.

    Attributes:
        kind: the method that prepares, "plain" for no change.
        settings: what else the result depends on: density, and for TIES the adapters that take part.
    """

    kind: str = "plain"
    settings: tuple[object, ...] = ()


@dataclass(frozen=True)
class Slot:
    """A prepared form of one adapter; rows of a batch that read the same one share it."""

    adapter: str
    prepared: Prepared


@dataclass(frozen=True)
class Mixing:
    """The coefficients of one slot in one row."""

    direct: float = 0.0
    gather: float = 0.0
    spread: float = 0.0


class Method(Protocol):
    """A way to combine adapters."""

    equal_ranks: bool
    """Whether the adapters must have the same rank (they are added up entry by entry)."""

    def prepared(self, composition: Composition) -> Prepared:
        """The form of the adapters that this composition reads."""

    def prepare(self, prepared: Prepared, layers: Mapping[str, LowRank]) -> dict[str, LowRank]:
        """Change one layer's tensors of all adapters that take part, by adapter."""

    def mixing(self, weight: float, scale: float) -> Mixing:
        """The coefficients of an adapter with this weight and this layer's scale."""


def each_half(layers: Mapping[str, LowRank], change: "Change") -> dict[str, LowRank]:
    """Apply a change to the stacked A's and the stacked B's of one layer."""
    names = list(layers)
    a_halves = change([layers[name].a for name in names])
    b_halves = change([layers[name].b for name in names])
    return {name: LowRank(a, b, layers[name].scale) for name, a, b in zip(names, a_halves, b_halves, strict=True)}


class Change(Protocol):
    """A change of one half (A or B) of a layer, for all adapters that take part."""

    def __call__(self, halves: Sequence[torch.Tensor], /) -> Sequence[torch.Tensor]:
        """The changed tensors, in the same order and shapes."""
