"""What a learned router says (the mixtures of experts of arXiv 2402.09997)."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import islice

from lorafleet.weighing.evidence import Evidence
from lorafleet.weighing.shares import Similar, task_shares
from lorafleet.weighing.weights import TaskWeights


@dataclass(frozen=True)
class Routed:
    """Takes the `k` likeliest tasks, and normalises their probabilities again; with a large `k`, all of them."""

    k: int = 3

    def weigh(self, neighbours: Iterable[Similar], among: Collection[str] | None = None) -> TaskWeights:
        """The weights of the tasks that the router knows, among these."""
        evidence = Evidence.of(neighbours)
        shares = task_shares(evidence, among)
        if evidence.router is None or evidence.embedding is None:
            return TaskWeights({}, shares)
        likely = evidence.router.probabilities(evidence.embedding, among)
        return TaskWeights.normalised(dict(islice(likely.items(), self.k)), shares)
