"""magnitude_prune: linear over adapters of which only the largest values are kept (PEFT's "magnitude_prune")."""

from collections.abc import Sequence

import torch

from lorafleet.composition.composition import Composition
from lorafleet.composition.methods.linear import Linear
from lorafleet.composition.methods.method import ChangedLayers, Layers, Prepared, each_half


def keep_largest(halves: Sequence[torch.Tensor], density: float) -> list[torch.Tensor]:
    """Keep of each layer's values the share `density`, the largest by magnitude, and zero the rest.

    PEFT's `magnitude_based_pruning`, of many layers at once.

    Args:
        halves: [layers, ...] each.
    """
    return [half if density == 1 else half * _largest(half.flatten(1).abs(), density).view_as(half) for half in halves]


def _largest(sizes: torch.Tensor, density: float) -> torch.Tensor:
    """1 where a value is among the largest of its row, else 0."""
    kept = sizes.topk(int(density * sizes.shape[1]), dim=1, sorted=False).indices
    return torch.zeros_like(sizes).scatter_(1, kept, 1.0)


class MagnitudePrune(Linear):
    """Pruning does not depend on the weights, so an adapter is pruned once for a density."""

    def prepared(self, composition: Composition) -> Prepared:
        """Pruned to the composition's density."""
        return Prepared("magnitude_prune", (composition.density,))

    def prepare(self, prepared: Prepared, layers: Layers) -> ChangedLayers:
        """Prune A and B of each adapter by itself."""
        (density,) = prepared.settings
        assert isinstance(density, float)
        return each_half(layers, lambda halves, modules, names: keep_largest(halves, density))
