"""Which linear layers of a model read the same input, and can share one product."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from torch import nn

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one parent that transformers' decoder models call on the same tensor."""


@dataclass(frozen=True)
class LayerGroup:
    """Linear layers with one input; their outputs lie side by side.

    Attributes:
        modules: their names in the base model.
        inputs: features of the input.
        outputs: features of each one's output.
    """

    modules: tuple[str, ...]
    inputs: int
    outputs: tuple[int, ...]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each one's output begins, and where the last one's ends."""
        return tuple(accumulate(self.outputs, initial=0))


def layer_groups(model: nn.Module) -> list[LayerGroup]:
    """The groups of a model's linear layers, the output head left out; a layer without siblings is a group by itself."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"}
    groups: list[LayerGroup] = []
    seen: set[str] = set()
    for name, layer in layers.items():
        if name not in seen:
            members = _with_siblings(name, layers)
            seen.update(members)
            groups.append(LayerGroup(members, layer.in_features, tuple(layers[member].out_features for member in members)))
    return groups


def _with_siblings(name: str, layers: Mapping[str, nn.Linear]) -> tuple[str, ...]:
    parent, _, own = name.rpartition(".")
    for siblings in SIBLINGS:
        members = tuple(f"{parent}.{sibling}" for sibling in siblings)
        if own in siblings and all(member in layers for member in members):
            # Only plain layers of one kind become one: a quantised layer keeps to itself.
            kinds = {
                (type(layer), layer.in_features, layer.weight.dtype, layer.bias is None)
                for layer in (layers[member] for member in members)
            }
            if len(kinds) == 1 and type(layers[name]) is nn.Linear:
                return members
    return (name,)
