"""The nearest prototypes whose sparse combination comes nearest to the query (arXiv 2410.09908)."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from lorafleet.weighing.evidence import Evidence
from lorafleet.weighing.projection import project
from lorafleet.weighing.shares import Similar, task_shares
from lorafleet.weighing.weights import TaskWeights

MOST_PROTOTYPES = 64
"""The solver's time grows with the cube of their number: 64 take 0.1 s, 256 take 12 s."""


@dataclass(frozen=True)
class SparseProjection:
    """Projects the query onto the `k` nearest prototypes. Weights may be negative, and sum to 1.

    Attributes:
        penalty: of the weights' absolute values: at 0 the affine projection, at a large one no weight is negative.
        k: above MOST_PROTOTYPES as many as that.
    """

    penalty: float = 1.0
    k: int = 3

    def weigh(self, neighbours: Iterable[Similar], among: Collection[str] | None = None) -> TaskWeights:
        """The weights of the tasks that have a prototype, among these; the largest absolute value first."""
        evidence = Evidence.of(neighbours)
        shares = task_shares(evidence, among)
        nearest = evidence.nearest(min(self.k, MOST_PROTOTYPES), among)
        if not nearest or evidence.embedding is None:
            return TaskWeights({}, shares)
        weights = project(evidence.embedding, np.stack([near.vector for near in nearest]), self.penalty)
        found = {near.task: float(weight) for near, weight in zip(nearest, weights, strict=True) if weight}
        return TaskWeights(dict(sorted(found.items(), key=lambda item: (-abs(item[1]), item[0]))), shares)
