"""The door through which transformers' models call the engine's attention.

A model that is set to ATTENTION calls `Attention.attend` in every layer, with the pass's attention handed through its
forward pass. All tokens of a pass stand in one row, one sequence behind the other; nothing is padded.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface

ATTENTION = "lorafleet"


@dataclass(frozen=True)
class Manner:
    """How a layer attends.

    Attributes:
        scale: of the scores.
        window: a token sees so many keys, itself among them; 0 for all.
        softcap: scores become softcap * tanh(scores / softcap); 0 for as they are.
    """

    scale: float
    window: int = 0
    softcap: float = 0.0


class Attention(Protocol):
    """The attention of one pass: what it stores, and what its tokens see."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, manner: Manner
    ) -> torch.Tensor:
        """Store the tokens' keys and values, and let the tokens attend.

        Args:
            query: [1, heads, tokens, head_dim].
            key, value: [1, key heads, tokens, head_dim].

        Returns:
            [1, tokens, heads, head_dim].
        """


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    attention_pass: Attention | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    assert attention_pass is not None, "the model was called without the engine"
    layer = module.layer_idx
    assert isinstance(layer, int)
    manner = Manner(scaling or query.shape[-1] ** -0.5, sliding_window or 0, softcap or 0.0)
    return attention_pass.attend(layer, query, key, value, manner), None


AttentionInterface.register(ATTENTION, _attend)
