"""A different weighted composition of adapters for every row of a batch, without merging anything.

Reads from top to bottom: `adapter` (one LoRA adapter, read from PEFT's format), `composition` (what a request asks for),
`methods` (what each method makes of adapters and weights), `groups` (the layers that share an input), `pages` (the prepared
adapters on the device), `pool` (the adapters there are, and who holds which pages), `plan` and `products` (what the rows of
a pass take, in plain torch), `blocks`, `tables` and `kernels` (the same for GPUs),
`layer` (how a plan changes a model). Nothing here knows where weights come from.
"""

from lorafleet.composition.adapter import Adapter, LowRank, load_adapter
from lorafleet.composition.composition import BASE, Composition
from lorafleet.composition.layer import ComposedModel
from lorafleet.composition.methods import METHODS
from lorafleet.composition.pages import page_rank_for
from lorafleet.composition.plan import Run
from lorafleet.composition.pool import AdapterPool, Lease, Recipe

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
    "load_adapter",
    "page_rank_for",
]
