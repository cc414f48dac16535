"""What a request asks for: which adapters, how much of each, and how they are combined."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from lorafleet.errors import CompositionError

LEAST_DENSITY = 0.01
MajoritySign = Literal["frequency", "total"]


@dataclass(frozen=True)
class Composition:
    """A weighted composition of adapters.

    Attributes:
        method: a name in METHODS.
        weights: of the adapters, by name; any sign; none at all is the base model.
        density: the share of an adapter's values that pruning methods keep, above 0 and at most 1. It is rounded to
            hundredths, at least one, so that there are at most a hundred pruned forms of an adapter.
        majority_sign: how TIES elects a sign: by count ("frequency") or by sum ("total"), as in PEFT.

    Raises:
        CompositionError: a weight is not finite, or the density is out of range.
    """

    method: str = "linear"
    weights: Mapping[str, float] = field(default_factory=dict)
    density: float = 0.8
    majority_sign: MajoritySign = "frequency"

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if not math.isfinite(weight):
                raise CompositionError(f"weights.{name} is {weight}", "Give a finite number")
        if not 0 < self.density <= 1:
            raise CompositionError(f"density is {self.density}", "Give a number above 0 and at most 1")
        object.__setattr__(self, "density", max(round(float(self.density), 2), LEAST_DENSITY))
        used = {name: float(weight) for name, weight in self.weights.items() if weight != 0}
        object.__setattr__(self, "weights", MappingProxyType(used))

    def __reduce__(self) -> tuple[object, ...]:
        return Composition, (self.method, dict(self.weights), self.density, self.majority_sign)

    @property
    def is_base(self) -> bool:
        """Whether no adapter takes part."""
        return not self.weights


BASE = Composition()
