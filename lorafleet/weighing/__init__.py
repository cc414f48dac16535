"""From neighbours to task weights."""

from lorafleet.weighing.nucleus import nucleus_weights
from lorafleet.weighing.weights import TaskWeights

__all__ = ["TaskWeights", "nucleus_weights"]
