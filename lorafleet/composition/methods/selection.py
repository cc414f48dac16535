"""selection: the adapter of the largest weight, alone and whole."""

from collections.abc import Mapping

from lorafleet.composition.methods.cat import Cat


class Selection(Cat):
    """One adapter answers; of equal weights the first by name."""

    def weights(self, weights: Mapping[str, float]) -> Mapping[str, float]:
        """1 for the largest, nothing for the others."""
        return {min(weights, key=lambda name: (-weights[name], name)): 1.0}
