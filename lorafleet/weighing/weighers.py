"""The weighers by their names. A new one is a file of its own and a line in `WEIGHERS`."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any, Protocol

from lorafleet.weighing.nucleus import Nucleus
from lorafleet.weighing.shares import Similar
from lorafleet.weighing.softmax import Softmax
from lorafleet.weighing.top_k import TopK
from lorafleet.weighing.uniform import Uniform
from lorafleet.weighing.weights import TaskWeights


class Weigher(Protocol):
    """Turns a query's neighbours into task weights; its fields are its settings."""

    def weigh(self, neighbours: Iterable[Similar], among: Collection[str] | None = None) -> TaskWeights:
        """Weights that sum to 1, the heaviest first; empty where no neighbour counts.

        Args:
            among: only these tasks count (those that have an adapter); all where absent.
        """


WEIGHERS: Mapping[str, type[Weigher]] = {"nucleus": Nucleus, "top_k": TopK, "softmax": Softmax, "uniform": Uniform}


def settings_of(name: str) -> tuple[str, ...]:
    """The names of a weigher's settings."""
    return tuple(field.name for field in fields(WEIGHERS[name]))  # type: ignore[arg-type]


def make_weigher(name: str, settings: Mapping[str, Any]) -> Weigher:
    """A weigher by its name, with those of the settings that it has."""
    return WEIGHERS[name](**{setting: settings[setting] for setting in settings_of(name) if setting in settings})
