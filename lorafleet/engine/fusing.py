"""Small operations of a model as one kernel each, by torch's compiler: on a GPU they cost launches and trips to memory.

Only what stands between the layers' products is compiled: the normalisations, and the gate of the feed-forward blocks.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


def fuse(model: nn.Module, backend: str = "inductor") -> None:
    """Replace `forward` of the normalisations and of the gated feed-forward blocks; other modules stay as they are.

    Args:
        backend: of `torch.compile`.
    """
    compiled = partial(torch.compile, dynamic=True, backend=backend)
    gate = compiled(_gate)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = compiled(module.forward)
        elif all(hasattr(module, name) for name in GATED):
            module.forward = partial(_gated, module, gate)


def _gate(activation: Callable[[torch.Tensor], torch.Tensor], gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return activation(gate) * up


def _gated(module: nn.Module, gate: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """down(activation(gate(x)) * up(x)), as the Llama, Qwen, Mistral and Gemma families compute it."""
    gate_proj, up_proj, down_proj = (module.get_submodule(name) for name in GATED[:3])
    down: torch.Tensor = down_proj(gate(module.act_fn, gate_proj(x), up_proj(x)))
    return down
