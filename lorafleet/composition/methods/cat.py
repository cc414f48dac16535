"""cat: the weighted sum of the adapters' outputs (PEFT's "cat", task arithmetic on the outputs)."""

from lorafleet.composition.methods.method import Method, Mixing


class Cat(Method):
    """sum_i w_i B_i A_i x; ranks may differ."""

    def mixing(self, weight: float) -> Mixing:
        """Each adapter keeps to itself."""
        return Mixing(direct=weight)
