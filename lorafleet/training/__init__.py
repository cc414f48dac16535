"""One adapter from its examples. Never imports Ray; jobs/train_adapters.py fans it out.

Reads from top to bottom: `adapter` (train_adapter), `backends` and `quantization` (who puts LoRA layers into which base),
`optimisation` (the steps), `ranks` (several processes for one adapter), `weights`, `passes` and `graphs` (gradients, and
how they are computed), `attention`, `loss`, `rows` (examples as token ids, batches), `checkpoints` and `randomness` (what a
killed run goes on from), `tracking` (who is told), `cards` (what is known about an adapter, and whether it is still
current). Before the work: `checks`, `figures` and `speed`.
"""

from lorafleet.training.adapter import sweep, train_adapter
from lorafleet.training.backends import choose_backend
from lorafleet.training.cards import AdapterCard, adapter_name, is_current, read_card
from lorafleet.training.checkpoints import delete_checkpoints
from lorafleet.training.rows import optimiser_steps

__all__ = [
    "AdapterCard",
    "adapter_name",
    "choose_backend",
    "delete_checkpoints",
    "is_current",
    "optimiser_steps",
    "read_card",
    "sweep",
    "train_adapter",
]
