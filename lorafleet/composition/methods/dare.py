"""dare_linear: linear over adapters of which a random share is kept and scaled up (PEFT's "dare_linear", 2311.03099)."""

import zlib
from collections.abc import Mapping, Sequence

import torch
from peft.utils.merge_utils import random_pruning

from lorafleet.composition.adapter import LowRank
from lorafleet.composition.composition import Composition
from lorafleet.composition.methods.linear import Linear
from lorafleet.composition.methods.method import Prepared, each_half


def keep_at_random(halves: Sequence[torch.Tensor], module: str, names: Sequence[str], density: float) -> list[torch.Tensor]:
    """Keep each value with probability `density`, divided by it.

    Which ones is drawn from the names of adapter and module and the tensor's shape: every replica drops the same, always.
    """
    if density == 1:
        return list(halves)
    kept = []
    for name, half in zip(names, halves, strict=True):
        with torch.random.fork_rng(devices=[half.device] if half.is_cuda else []):
            torch.manual_seed(zlib.crc32(f"{name} {module} {tuple(half.shape)}".encode()))
            kept.append(random_pruning(half, density, rescale=True))
    return kept


class DareLinear(Linear):
    """The draw does not depend on the weights, so an adapter is pruned once for a density."""

    def prepared(self, composition: Composition) -> Prepared:
        """Thinned to the composition's density."""
        return Prepared("dare_linear", (composition.density,))

    def prepare(self, prepared: Prepared, module: str, layers: Mapping[str, LowRank]) -> dict[str, LowRank]:
        """Thin A and B of each adapter by itself."""
        (density,) = prepared.settings
        assert isinstance(density, float)
        return each_half(layers, lambda halves: keep_at_random(halves, module, list(layers), density))
