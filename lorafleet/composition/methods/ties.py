"""ties: linear over adapters trimmed to the values that agree with the elected sign (PEFT's "ties", arXiv 2306.01708)."""

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from peft.utils.merge_utils import calculate_majority_sign_mask

from lorafleet.composition.adapter import LowRank
from lorafleet.composition.composition import Composition
from lorafleet.composition.methods.linear import Linear
from lorafleet.composition.methods.magnitude_prune import prune
from lorafleet.composition.methods.method import Mixing, Prepared, each_half


class Ties:
    """A value counts where its sign is the elected one, divided by the number of adapters whose value counts there.

    Signs are elected over the unweighted tensors, so the result depends on which adapters take part and not on their
    weights: it is prepared once for a set of adapters.
    """

    equal_ranks = True

    def prepared(self, composition: Composition) -> Prepared:
        """Trimmed and elected among the adapters of this composition."""
        members = tuple(sorted(composition.weights))
        return Prepared("ties", (composition.density, composition.majority_sign, members))

    def prepare(self, prepared: Prepared, layers: Mapping[str, LowRank]) -> dict[str, LowRank]:
        """Trim, elect, and divide by the count that agrees (PEFT's disjoint merge, before the sum)."""
        density, majority_sign, _ = prepared.settings
        assert isinstance(density, float)
        elect = cast(Literal["total", "frequency"], majority_sign)

        def agree(halves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            trimmed = torch.stack(prune(halves, density))
            mask = calculate_majority_sign_mask(trimmed, method=elect)
            return list((trimmed * mask / mask.sum(dim=0).clamp(min=1)).unbind())

        return each_half(layers, agree)

    def mixing(self, weight: float, scale: float) -> Mixing:
        """As in linear."""
        return Linear().mixing(weight, scale)
