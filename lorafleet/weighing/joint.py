"""What a learned router and the neighbours say together: a product of experts."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import islice

from lorafleet.weighing.evidence import Evidence
from lorafleet.weighing.shares import Similar, task_shares
from lorafleet.weighing.weights import TaskWeights

FLOOR = 0.005
"""Of a share: a task that is not among the neighbours may still be the router's."""


@dataclass(frozen=True)
class Joint:
    """Takes up to `k` tasks with the largest product of the router's probability and their share of the neighbours.

    The router knows where the tasks lie as a whole, the neighbours what lies around the query: each errs where the other
    does not. Where no router has learned yet, and with one task alone, the shares decide. A task that has come since it has
    learned is as likely as its share.
    """

    k: int = 3

    def weigh(self, neighbours: Iterable[Similar], among: Collection[str] | None = None) -> TaskWeights:
        """The weights of the tasks that the router knows or that the neighbours are of, among these."""
        evidence = Evidence.of(neighbours)
        shares = task_shares(evidence, among)
        if evidence.router is None or evidence.embedding is None:
            return TaskWeights.normalised(dict(islice(shares.items(), self.k)), shares)
        known = evidence.router.probabilities(evidence.embedding, among)
        new = {task: share for task, share in shares.items() if task not in known}
        left = max(0.0, 1 - sum(new.values()))
        likely = {task: probability * left for task, probability in known.items()} | new
        masses = {task: probability * (shares.get(task, 0.0) + FLOOR) for task, probability in likely.items()}
        heaviest = sorted(masses.items(), key=lambda item: (-item[1], item[0]))[: self.k]
        return TaskWeights.normalised({task: mass for task, mass in heaviest if mass}, shares)
