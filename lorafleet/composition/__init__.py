"""A different weighted composition of adapters for every row of a batch, without merging anything.

Reads from top to bottom: `adapter` (one LoRA adapter, read from PEFT's format), `composition` (what a request asks for),
`methods` (what each method makes of adapters and weights), `pool` (the adapters there are, and the plan of a batch),
`layer` (how a plan changes a model's linear layers). Nothing here knows where weights come from.
"""

from lorafleet.composition.adapter import Adapter, LowRank, load_adapter
from lorafleet.composition.composition import BASE, Composition
from lorafleet.composition.layer import ComposedModel
from lorafleet.composition.methods import METHODS
from lorafleet.composition.pool import AdapterPool, Plan

__all__ = ["BASE", "METHODS", "Adapter", "AdapterPool", "ComposedModel", "Composition", "LowRank", "Plan", "load_adapter"]
