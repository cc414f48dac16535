"""Forward and backward passes over batches, whose losses and gradients add up."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from peft import PeftModel

from lorafleet.training.loss import summed_answer_loss
from lorafleet.training.rows import TokenBatch, TokenRow, pad
from lorafleet.training.weights import Weights


class Passes:
    """Adds up the loss and the gradients of batches in `weights.sums`.

    Args:
        adapter: the model with LoRA layers; they come to hold views of `weights`.
        own_kernels: the layers take weights in float32 and cast by themselves, as unsloth's do under autocast.

    Attributes:
        capturable: whether nothing but the device's kernels is needed again, to compute another batch of the same shape.
    """

    def __init__(self, adapter: PeftModel, pad_id: int, own_kernels: bool) -> None:
        self.adapter, self.pad_id, self.capturable = adapter, pad_id, not own_kernels
        computed = next(
            weight.dtype for weight in adapter.parameters() if weight.is_floating_point() and not weight.requires_grad
        )
        self.weights = Weights(adapter, torch.float32 if own_kernels else computed)
        self.device = self.weights.master.device
        self._autocast = computed if own_kernels and computed != torch.float32 else None

    def add(self, rows: Sequence[TokenRow], answers: torch.Tensor) -> None:
        """Take a batch's share of the mean loss over `answers` tokens (a scalar on the device)."""
        self.run(pad(rows, self.pad_id).to(self.device), answers)

    def run(self, batch: TokenBatch, answers: torch.Tensor) -> None:
        """Compute loss and gradients of a batch, and add them up; the host does not wait for them."""
        with self.precision():
            loss = summed_answer_loss(self.adapter, batch) / answers
        loss.backward()  # type: ignore[no-untyped-call]
        self.weights.collect()
        self.weights.loss.add_(loss.detach())

    def precision(self) -> AbstractContextManager[object]:
        """Mixed precision where it is asked for."""
        return torch.autocast(self.device.type, self._autocast) if self._autocast else nullcontext()
