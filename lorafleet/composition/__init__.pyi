from .adapter import Adapter, LowRank, check_number_format, load_adapter
from .composition import BASE, Composition
from .layer import ComposedModel
from .methods import METHODS
from .pages import page_rank_for
from .plan import Run
from .pool import AdapterPool, Lease, Recipe

__all__ = [
    "BASE",
    "METHODS",
    "Adapter",
    "AdapterPool",
    "ComposedModel",
    "Composition",
    "Lease",
    "LowRank",
    "Recipe",
    "Run",
    "check_number_format",
    "load_adapter",
    "page_rank_for",
]
