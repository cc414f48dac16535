"""linear: the product of the weighted sums of A and of B (PEFT's "linear")."""

import math

from lorafleet.composition.methods.method import Method, Mixing


class Linear(Method):
    """(sum_j b_j B_j)(sum_i a_i A_i) x with b = sqrt|w| and a = sign(w) b, as PEFT 0.21 splits weights of any sign."""

    equal_ranks = True

    def mixing(self, weight: float) -> Mixing:
        """The root of the weight on either side, the sign on A alone."""
        root = math.sqrt(abs(weight))
        return Mixing(gather=math.copysign(root, weight), spread=root)
