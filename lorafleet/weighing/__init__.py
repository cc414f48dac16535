"""From neighbours to task weights: weights, shares, then one file for each weigher, and weighers, which names them."""

from lorafleet.weighing.nucleus import Nucleus
from lorafleet.weighing.shares import Similar, task_shares
from lorafleet.weighing.softmax import Softmax
from lorafleet.weighing.top_k import TopK
from lorafleet.weighing.uniform import Uniform
from lorafleet.weighing.weighers import WEIGHERS, Weigher, make_weigher, settings_of
from lorafleet.weighing.weights import TaskWeights

__all__ = [
    "WEIGHERS",
    "Nucleus",
    "Similar",
    "Softmax",
    "TaskWeights",
    "TopK",
    "Uniform",
    "Weigher",
    "make_weigher",
    "settings_of",
    "task_shares",
]
