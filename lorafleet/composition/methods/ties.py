"""ties and dare_ties: linear over pruned adapters, less the values against the elected sign.

PEFT's "ties" (arXiv 2306.01708) keeps the largest values, its "dare_ties" a random share.
"""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from peft.utils.merge_utils import calculate_majority_sign_mask

from lorafleet.composition.composition import Composition
from lorafleet.composition.methods.dare import keep_at_random
from lorafleet.composition.methods.linear import Linear
from lorafleet.composition.methods.magnitude_prune import keep_largest
from lorafleet.composition.methods.method import ChangedLayers, Layers, Prepared, each_half


class Ties(Linear):
    """A value counts where its sign is the elected one, divided by the number of adapters whose value counts there.

    Signs are elected over the unweighted tensors, so the result depends on which adapters take part and not on their
    weights: it is prepared once for a set of adapters.
    """

    kind = "ties"

    def prepared(self, composition: Composition) -> Prepared:
        """Trimmed and elected among the adapters of this composition."""
        members = tuple(sorted(composition.weights))
        return Prepared(self.kind, (composition.density, composition.majority_sign), members)

    def prepare(self, prepared: Prepared, layers: Layers) -> ChangedLayers:
        """Trim, elect, and divide by the count that agrees (PEFT's disjoint merge, before the sum)."""
        density, majority_sign = prepared.settings
        assert isinstance(density, float)
        elect = cast(Literal["total", "frequency"], majority_sign)

        def agree(halves: Sequence[torch.Tensor], modules: Sequence[str], names: Sequence[str]) -> Sequence[torch.Tensor]:
            trimmed = torch.stack(self.trim(halves, modules, names, density))
            mask = calculate_majority_sign_mask(trimmed, method=elect)
            return list((trimmed * mask / mask.sum(dim=0).clamp(min=1)).unbind())

        return each_half(layers, agree)

    def trim(
        self, halves: Sequence[torch.Tensor], modules: Sequence[str], names: Sequence[str], density: float
    ) -> list[torch.Tensor]:
        """The values that take part in the election, by adapter."""
        return keep_largest(halves, density)


class DareTies(Ties):
    """The same over a random share of the values."""

    kind = "dare_ties"

    def trim(
        self, halves: Sequence[torch.Tensor], modules: Sequence[str], names: Sequence[str], density: float
    ) -> list[torch.Tensor]:
        """A random share, scaled up."""
        return keep_at_random(halves, modules, names, density)
