"""From what is known of a query to task weights.

Reads from top to bottom: `weights`, `shares` (of the neighbours' similarity), `prototypes` and `router` (what else a task
can be known by), `evidence` (all of it, for one query), one file for each weigher, `sharpened` and `abstaining` (what goes
for each of them), `row_sample` and `places` (prototypes and router, learned from rows and kept), and `weighers`, which
names them all.
"""

from lorafleet.weighing.abstaining import Abstaining
from lorafleet.weighing.evidence import Evidence
from lorafleet.weighing.joint import Joint
from lorafleet.weighing.nearest_prototypes import NearestPrototypes
from lorafleet.weighing.nucleus import Nucleus
from lorafleet.weighing.places import Places, learn_places, read_places, write_places
from lorafleet.weighing.prototypes import Prototypes
from lorafleet.weighing.routed import Routed
from lorafleet.weighing.router import Router, train_router
from lorafleet.weighing.shares import Similar, task_shares
from lorafleet.weighing.sharpened import sharpened
from lorafleet.weighing.softmax import Softmax
from lorafleet.weighing.sparse_projection import MOST_PROTOTYPES, SparseProjection
from lorafleet.weighing.top_k import TopK
from lorafleet.weighing.uniform import Uniform
from lorafleet.weighing.weigher import Weigher
from lorafleet.weighing.weighers import BY_NEIGHBOURS, BY_PLACE, LEARNED, WEIGHERS, make_weigher, settings_of
from lorafleet.weighing.weights import TaskWeights

__all__ = [
    "BY_NEIGHBOURS",
    "BY_PLACE",
    "LEARNED",
    "MOST_PROTOTYPES",
    "WEIGHERS",
    "Abstaining",
    "Evidence",
    "Joint",
    "NearestPrototypes",
    "Nucleus",
    "Places",
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
    "learn_places",
    "make_weigher",
    "read_places",
    "settings_of",
    "sharpened",
    "task_shares",
    "train_router",
    "write_places",
]
