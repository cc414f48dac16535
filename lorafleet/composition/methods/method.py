"""What a method is.

Every method here is linear in the weights once its adapters are prepared. For a row with activations x, the prepared
adapters i with their A_i and B_i (the scale alpha / rank folded into both), the composed adapter adds

    sum_j B_j z_j,     z_j = direct_j (A_j x) + spread_j sum_i gather_i (A_i x)

`direct` alone keeps each adapter to itself (cat); `gather` and `spread` alone are the product of two weighted sums
(linear). So a method says which prepared forms of the adapters a composition reads, and the three coefficients of each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lorafleet.composition.adapter import LowRank
from lorafleet.composition.composition import Composition

Layers = Mapping[str, Mapping[str, LowRank]]
"""By module, what each adapter that takes part adds to it, by adapter."""
ChangedLayers = dict[str, dict[str, LowRank]]


@dataclass(frozen=True)
class Prepared:
    """How an adapter's tensors are changed before they are read; equal ones are made once and shared.

    Attributes:
        kind: the method that prepares, "plain" for no change.
        settings: what else the result depends on, such as the density.
        members: the adapters that the result depends on together; none where each is prepared by itself.
    """

    kind: str = "plain"
    settings: tuple[object, ...] = ()
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slot:
    """A prepared form of one adapter; rows of a batch that read the same one share it."""

    adapter: str
    prepared: Prepared = Prepared()


@dataclass(frozen=True)
class Mixing:
    """The coefficients of one slot in one row."""

    direct: float = 0.0
    gather: float = 0.0
    spread: float = 0.0


class Method:
    """A way to combine adapters. What is written here suits a method that reads the adapters as they are."""

    equal_ranks = False
    """Whether the adapters must have the same rank (they are added up entry by entry)."""

    def weights(self, weights: Mapping[str, float]) -> Mapping[str, float]:
        """The weights that count, where the method has its own mind about them."""
        return weights

    def parts(self, composition: Composition) -> dict[Slot, Mixing]:
        """The slots that a composition of at least two adapters reads, with their coefficients."""
        prepared = self.prepared(composition)
        return {Slot(name, prepared): self.mixing(weight) for name, weight in composition.weights.items()}

    def prepared(self, composition: Composition) -> Prepared:
        """The form of the adapters that this composition reads."""
        return Prepared()

    def prepare(self, prepared: Prepared, layers: Layers) -> ChangedLayers:
        """Change the tensors of some layers, of all adapters that take part."""
        return {module: dict(of_layer) for module, of_layer in layers.items()}

    def mixing(self, weight: float) -> Mixing:
        """The coefficients of an adapter with this weight."""
        raise NotImplementedError


class Change(Protocol):
    """What is done to the A's, or to the B's, of layers of one shape."""

    def __call__(
        self, halves: Sequence[torch.Tensor], modules: Sequence[str], names: Sequence[str]
    ) -> Sequence[torch.Tensor]:
        """Of each adapter in `names` a tensor whose first dimension is that of `modules`, float32, to one of that shape."""


def each_half(layers: Layers, change: Change) -> ChangedLayers:
    """Apply a change to the A's and then to the B's, for all adapters that take part.

    It works in float32, as in PEFT, whatever format the adapters were saved in.
    """
    found: ChangedLayers = {}
    for modules in of_one_shape(layers):
        names = list(layers[modules[0]])
        a_halves = change([torch.stack([layers[m][name].a.float() for m in modules]) for name in names], modules, names)
        b_halves = change([torch.stack([layers[m][name].b.float() for m in modules]) for name in names], modules, names)
        for place, module in enumerate(modules):
            found[module] = {
                name: LowRank(a[place], b[place], layers[module][name].scale)
                for name, a, b in zip(names, a_halves, b_halves, strict=True)
            }
    return found


def of_one_shape(layers: Layers) -> list[list[str]]:
    """The layers that the same adapters change, in tensors of the same shapes: they can be computed together."""
    alike: dict[object, list[str]] = {}
    for module, of_layer in layers.items():
        shapes = tuple((name, layer.a.shape, layer.b.shape) for name, layer in of_layer.items())
        alike.setdefault(shapes, []).append(module)
    return list(alike.values())
