"""The weighers by their names. A new one is a file of its own and a line here.

Those that look at where a query lies stand in `BY_PLACE`: they need an `Evidence` with more than neighbours.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lorafleet.weighing.abstaining import Abstaining
from lorafleet.weighing.joint import Joint
from lorafleet.weighing.nearest_prototypes import NearestPrototypes
from lorafleet.weighing.nucleus import Nucleus
from lorafleet.weighing.routed import Routed
from lorafleet.weighing.sharpened import Sharpened
from lorafleet.weighing.softmax import Softmax
from lorafleet.weighing.sparse_projection import SparseProjection
from lorafleet.weighing.top_k import TopK
from lorafleet.weighing.uniform import Uniform
from lorafleet.weighing.weigher import Weigher

BY_NEIGHBOURS: Mapping[str, type[Weigher]] = {"nucleus": Nucleus, "top_k": TopK, "softmax": Softmax, "uniform": Uniform}
BY_PLACE: Mapping[str, type[Weigher]] = {
    "prototypes": NearestPrototypes,
    "sparse_projection": SparseProjection,
    "routed": Routed,
    "joint": Joint,
}
LEARNED = ("routed", "joint")
"""Those of them that ask a router."""
WEIGHERS: Mapping[str, type[Weigher]] = {**BY_NEIGHBOURS, **BY_PLACE}


def settings_of(name: str) -> tuple[str, ...]:
    """The names of a weigher's settings."""
    return tuple(field.name for field in fields(WEIGHERS[name]))  # type: ignore[arg-type]


def make_weigher(name: str, settings: Mapping[str, Any]) -> Weigher:
    """A weigher by its name, with those of the settings that it has; `sharpness` and `abstain_below` go for each of them."""
    weigher: Weigher = WEIGHERS[name](**{setting: settings[setting] for setting in settings_of(name) if setting in settings})
    sharpness, below = settings.get("sharpness", 1), settings.get("abstain_below", 0)
    if sharpness != 1:
        weigher = Sharpened(weigher, sharpness)
    return Abstaining(weigher, below) if below > 0 else weigher
