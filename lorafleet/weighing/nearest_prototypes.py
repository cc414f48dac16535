"""A softmax over the cosines of the nearest prototypes."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from lorafleet.weighing.evidence import Evidence
from lorafleet.weighing.shares import Similar, task_shares
from lorafleet.weighing.weights import TaskWeights


@dataclass(frozen=True)
class NearestPrototypes:
    """Takes the `k` tasks with the nearest prototypes, and weighs them by the softmax of their cosines.

    With `k` 1 this is LoraRetriever's selection (arXiv 2402.09997), at a high temperature its equal weights; LORAUTER (arXiv
    2601.21795) has a temperature of 0.2.

    Attributes:
        temperature: above 0.
    """

    temperature: float = 0.2
    k: int = 3

    def weigh(self, neighbours: Iterable[Similar], among: Collection[str] | None = None) -> TaskWeights:
        """The weights of the tasks that have a prototype, among these."""
        evidence = Evidence.of(neighbours)
        nearest = evidence.nearest(self.k, among)
        best = max((near.similarity for near in nearest), default=0.0)
        masses = {near.task: math.exp((near.similarity - best) / self.temperature) for near in nearest}
        kept = {task: mass for task, mass in masses.items() if mass > 0}
        return TaskWeights.normalised(kept, task_shares(evidence, among))
