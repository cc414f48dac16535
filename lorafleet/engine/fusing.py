"""Small operations of a model as one kernel each, by torch's compiler: on a GPU they cost launches and trips to memory.

Only what stands between the layers' products is compiled: the normalisations, the rotation of queries and keys, and the gate
of the feed-forward blocks.
"""

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

ROTATION = "apply_rotary_pos_emb"
GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


def fuse(model: nn.Module, backend: str = "inductor") -> None:
    """Replace `forward` of the normalisations and of the gated feed-forward blocks; other modules stay as they are.

    The rotation is a function of the family's module in transformers: there it is replaced for all models of the process.

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
        elif type(module).__name__.endswith("Attention"):
            _fuse_rotation(sys.modules[type(module).__module__], compiled)


def _fuse_rotation(family: ModuleType, compiled: Callable[..., Callable[..., Any]]) -> None:
    rotation = getattr(family, ROTATION, None)
    if rotation is not None and not hasattr(rotation, "_torchdynamo_orig_callable"):
        setattr(family, ROTATION, compiled(rotation))


def _gate(activation: Callable[[torch.Tensor], torch.Tensor], gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return activation(gate) * up


def _gated(module: nn.Module, gate: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """down(activation(gate(x)) * up(x)), as the Llama, Qwen, Mistral and Gemma families compute it."""
    gate_proj, up_proj, down_proj = (module.get_submodule(name) for name in GATED[:3])
    down: torch.Tensor = down_proj(gate(module.act_fn, gate_proj(x), up_proj(x)))
    return down
