"""LoRAFleet: train a fleet of LoRA adapters, index what each was trained on, and compose them for every request."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafleet.fleet import Fleet
    from lorafleet.weighing import TaskWeights

__all__ = ["Fleet", "TaskWeights"]


def __getattr__(name: str) -> Any:
    """Load the public classes when they are asked for: `lorafleet --help` should not wait for torch."""
    if name == "Fleet":
        from lorafleet.fleet import Fleet

        return Fleet
    if name == "TaskWeights":
        from lorafleet.weighing import TaskWeights

        return TaskWeights
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
