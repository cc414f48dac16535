"""fusion and mixture: every adapter counts the same, whatever its weight (LoraRetriever, arXiv 2402.09997, section 3.3)."""

from collections.abc import Mapping

from lorafleet.composition.methods.cat import Cat
from lorafleet.composition.methods.linear import Linear


def uniform(weights: Mapping[str, float]) -> Mapping[str, float]:
    """1/k for each of k adapters."""
    return dict.fromkeys(weights, 1 / len(weights))


class Fusion(Linear):
    """The average of the adapters' parameters."""

    def weights(self, weights: Mapping[str, float]) -> Mapping[str, float]:
        """1/k each."""
        return uniform(weights)


class Mixture(Cat):
    """The average of the adapters' outputs."""

    def weights(self, weights: Mapping[str, float]) -> Mapping[str, float]:
        """1/k each."""
        return uniform(weights)
