from .adapter import sweep, train_adapter
from .backends import choose_backend
from .cards import AdapterCard, adapter_name, is_current, read_card
from .checkpoints import delete_checkpoints
from .rows import optimiser_steps

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
