"""cat: the weighted sum of the adapters' outputs (PEFT's "cat", LoraRetriever's mixture)."""

from collections.abc import Mapping

from lorafleet.composition.adapter import LowRank
from lorafleet.composition.composition import Composition
from lorafleet.composition.methods.method import Mixing, Prepared


class Cat:
    """sum_i w_i s_i B_i A_i x; ranks may differ."""

    equal_ranks = False

    def prepared(self, composition: Composition) -> Prepared:
        """The adapters as they are."""
        return Prepared()

    def prepare(self, prepared: Prepared, layers: Mapping[str, LowRank]) -> dict[str, LowRank]:
        """No change."""
        return dict(layers)

    def mixing(self, weight: float, scale: float) -> Mixing:
        """Each adapter keeps to itself."""
        return Mixing(direct=weight * scale)
