"""linear: the product of the weighted sums of A and of B (PEFT's "linear", LoraRetriever's fusion)."""

import math
from collections.abc import Mapping

from lorafleet.composition.adapter import LowRank
from lorafleet.composition.composition import Composition
from lorafleet.composition.methods.method import Mixing, Prepared


class Linear:
    """(sum_j b_j B_j)(sum_i a_i A_i) x with b = sqrt|w s| and a = sign(w) b, as PEFT 0.21 splits weights of any sign."""

    equal_ranks = True

    def prepared(self, composition: Composition) -> Prepared:
        """The adapters as they are."""
        return Prepared()

    def prepare(self, prepared: Prepared, layers: Mapping[str, LowRank]) -> dict[str, LowRank]:
        """No change."""
        return dict(layers)

    def mixing(self, weight: float, scale: float) -> Mixing:
        """The root of the weight on either side, the sign on A alone."""
        root = math.sqrt(abs(weight * scale))
        return Mixing(gather=math.copysign(root, weight), spread=root)
