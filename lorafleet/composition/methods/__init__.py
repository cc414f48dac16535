"""The methods by name. A new one is a file beside this one, and a line in METHODS."""

from lorafleet.composition.methods.cat import Cat
from lorafleet.composition.methods.dare import DareLinear
from lorafleet.composition.methods.linear import Linear
from lorafleet.composition.methods.magnitude_prune import MagnitudePrune
from lorafleet.composition.methods.method import Method, Mixing, Prepared, Slot
from lorafleet.composition.methods.selection import Selection
from lorafleet.composition.methods.svd import Svd
from lorafleet.composition.methods.ties import DareTies, Ties
from lorafleet.composition.methods.uniform import Fusion, Mixture

METHODS: dict[str, Method] = {
    "linear": Linear(),
    "cat": Cat(),
    "ties": Ties(),
    "magnitude_prune": MagnitudePrune(),
    "dare_linear": DareLinear(),
    "dare_ties": DareTies(),
    "fusion": Fusion(),
    "mixture": Mixture(),
    "selection": Selection(),
    "svd": Svd(),
}

__all__ = ["METHODS", "Method", "Mixing", "Prepared", "Slot"]
