"""One adapter out of several: their parameters averaged, before anything is computed with them."""

from collections.abc import Mapping

from lorafleet.composition import Composition
from lorafleet.config import Settings
from lorafleet.evaluation.bench import Bench


def averaged(bench: Bench, weights: Mapping[str, float], settings: Settings) -> Composition:
    """The adapters' A and B, each averaged by these weights: `(sum_j w_j B_j)(sum_i w_i A_i)`.

    `linear` takes the root of a weight on either side and its sign on one, so that these weights squared, with their signs,
    are what it is given. They are what the records show.
    """
    return bench.composition({task: weight * abs(weight) for task, weight in weights.items()}, settings, "linear")
