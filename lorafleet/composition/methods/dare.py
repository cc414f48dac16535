"""dare_linear: linear over adapters of which a random share is kept and scaled up (PEFT's "dare_linear", 2311.03099)."""

import zlib
from collections.abc import Sequence

import torch
from peft.utils.merge_utils import random_pruning

from lorafleet.composition.composition import Composition
from lorafleet.composition.methods.linear import Linear
from lorafleet.composition.methods.method import ChangedLayers, Layers, Prepared, each_half


def keep_at_random(
    halves: Sequence[torch.Tensor], modules: Sequence[str], names: Sequence[str], density: float
) -> list[torch.Tensor]:
    """Keep each value with probability `density`, divided by it.

    Which ones is drawn from the names of adapter and module and the tensor's shape: every replica drops the same, always.

    Args:
        halves: of each adapter, [modules, ...].
    """
    if density == 1:
        return list(halves)
    kept = []
    devices = [halves[0].device] if halves and halves[0].is_cuda else []
    with torch.random.fork_rng(devices=devices):
        for name, half in zip(names, halves, strict=True):
            layers = []
            for module, layer in zip(modules, half, strict=True):
                torch.manual_seed(zlib.crc32(f"{name} {module} {tuple(layer.shape)}".encode()))
                layers.append(random_pruning(layer, density, rescale=True))
            kept.append(torch.stack(layers))
    return kept


class DareLinear(Linear):
    """The draw does not depend on the weights, so an adapter is pruned once for a density."""

    def prepared(self, composition: Composition) -> Prepared:
        """Thinned to the composition's density."""
        return Prepared("dare_linear", (composition.density,))

    def prepare(self, prepared: Prepared, layers: Layers) -> ChangedLayers:
        """Thin A and B of each adapter by itself."""
        (density,) = prepared.settings
        assert isinstance(density, float)
        return each_half(layers, lambda halves, modules, names: keep_at_random(halves, modules, names, density))
