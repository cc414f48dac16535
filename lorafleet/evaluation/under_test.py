"""The methods under test: which adapters each one gives a row, and how it combines them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lorafleet.weighing import TaskWeights

Chooser = Callable[[str, TaskWeights], Mapping[str, float]]


@dataclass(frozen=True)
class MethodUnderTest:
    """A line of the table.

    Attributes:
        weights: the adapters' weights, from the row's own task and its weights by retrieval.
        method: how they are combined.
        retrieves: whether it needs the row's neighbours.
        knows_task: whether it is told the row's task; such a method has no meaning where the own adapter is masked.
    """

    weights: Chooser
    method: str = "cat"
    retrieves: bool = True
    knows_task: bool = False


def _none(task: str, weights: TaskWeights) -> Mapping[str, float]:
    return {}


def _own(task: str, weights: TaskWeights) -> Mapping[str, float]:
    return {task: 1.0}


def _first(task: str, weights: TaskWeights) -> Mapping[str, float]:
    return {next(iter(weights)): 1.0} if weights else {}


def _nucleus(task: str, weights: TaskWeights) -> Mapping[str, float]:
    return weights


UNDER_TEST: dict[str, MethodUnderTest] = {
    "base": MethodUnderTest(_none, retrieves=False),
    "perfect": MethodUnderTest(_own, retrieves=False, knows_task=True),
    "selection": MethodUnderTest(_first),
    "linear": MethodUnderTest(_nucleus, "linear"),
    "cat": MethodUnderTest(_nucleus, "cat"),
    "ties": MethodUnderTest(_nucleus, "ties"),
    "magnitude_prune": MethodUnderTest(_nucleus, "magnitude_prune"),
}
