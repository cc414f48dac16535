"""From what is known of a query to task weights.

Reads from top to bottom: `weights`, `shares` (of the neighbours' similarity), `prototypes` and `router` (what else a task
can be known by), `evidence` (all of it, for one query), one file for each weigher, and `weighers`, which names those that
need no more than the neighbours.
"""

from lorafleet.weighing.evidence import Evidence
from lorafleet.weighing.nearest_prototypes import NearestPrototypes
from lorafleet.weighing.nucleus import Nucleus
from lorafleet.weighing.prototypes import Prototypes
from lorafleet.weighing.routed import Routed
from lorafleet.weighing.router import Router, train_router
from lorafleet.weighing.shares import Similar, task_shares
from lorafleet.weighing.softmax import Softmax
from lorafleet.weighing.sparse_projection import SparseProjection
from lorafleet.weighing.top_k import TopK
from lorafleet.weighing.uniform import Uniform
from lorafleet.weighing.weighers import WEIGHERS, Weigher, make_weigher, settings_of
from lorafleet.weighing.weights import TaskWeights

__all__ = [
    "WEIGHERS",
    "Evidence",
    "NearestPrototypes",
    "Nucleus",
    "Prototypes",
    "Routed",
    "Router",
    "Similar",
    "Softmax",
    "SparseProjection",
    "TaskWeights",
    "TopK",
    "Uniform",
    "Weigher",
    "make_weigher",
    "settings_of",
    "task_shares",
    "train_router",
]
