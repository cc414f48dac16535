"""magnitude_prune: linear over adapters of which only the largest values are kept (PEFT's "magnitude_prune")."""

from collections.abc import Mapping, Sequence

import torch
from peft.utils.merge_utils import magnitude_based_pruning

from lorafleet.composition.adapter import LowRank
from lorafleet.composition.composition import Composition
from lorafleet.composition.methods.linear import Linear
from lorafleet.composition.methods.method import Prepared, each_half


def keep_largest(halves: Sequence[torch.Tensor], density: float) -> list[torch.Tensor]:
    """Keep the share `density` of each tensor's values, the largest by magnitude, and zero the rest."""
    return [half if density == 1 else magnitude_based_pruning(half, density) for half in halves]


class MagnitudePrune(Linear):
    """Pruning does not depend on the weights, so an adapter is pruned once for a density."""

    def prepared(self, composition: Composition) -> Prepared:
        """Pruned to the composition's density."""
        return Prepared("magnitude_prune", (composition.density,))

    def prepare(self, prepared: Prepared, module: str, layers: Mapping[str, LowRank]) -> dict[str, LowRank]:
        """Prune A and B of each adapter by itself."""
        (density,) = prepared.settings
        assert isinstance(density, float)
        return each_half(layers, lambda halves: keep_largest(halves, density))
