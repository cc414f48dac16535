"""The optimiser steps of one adapter, which can stop after any of them and go on in another process."""

import math
import random
import time
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from peft import PeftModel
from transformers import get_scheduler

from lorafleet.config import Training
from lorafleet.errors import TrainingError
from lorafleet.training.loss import mean_answer_loss, summed_answer_loss
from lorafleet.training.randomness import random_state, restore_random_state
from lorafleet.training.rows import TokenRow, endless_batches, optimiser_steps, pad

LOSS_SAMPLE_ROWS = 8


class Optimisation:
    """AdamW under a cosine schedule over endless batches: `start` it or `resume` it, then take its steps.

    Attributes:
        steps: how many there are to take.
        losses: the mean loss per answer token of every step's batch, before the step.
        tokens: that the steps saw, padding not counted.
        first_loss: mean loss per answer token over a fixed sample of the rows before the first step.
        resumed: the steps that earlier processes had come to, as far as they were kept.
    """

    def __init__(self, adapter: PeftModel, rows: list[TokenRow], pad_id: int, training: Training) -> None:
        self.steps = optimiser_steps(len(rows), training)
        self.losses: list[float] = []
        self.tokens = 0
        self.first_loss = math.nan
        self.resumed: list[int] = []
        self._began = time.monotonic()
        self._mend = f"Lower training.learning_rate = {training.learning_rate:g}, or set training.dtype to float32"
        self._adapter, self._pad_id, self._training = adapter, pad_id, training
        self._sample = random.Random(training.seed).sample(rows, min(LOSS_SAMPLE_ROWS, len(rows)))
        self._weights = {name: weight for name, weight in adapter.named_parameters() if weight.requires_grad}
        self._device = next(iter(self._weights.values())).device
        self._optimiser = torch.optim.AdamW(
            self._weights.values(), lr=training.learning_rate, weight_decay=training.weight_decay
        )
        # A small corpus has fewer steps than the warm-up asks for, and would never reach the learning rate.
        warmup = min(training.warmup_steps, self.steps // 3)
        self._schedule = get_scheduler("cosine", self._optimiser, num_warmup_steps=warmup, num_training_steps=self.steps)
        self._batches = endless_batches(rows, training.batch, training.seed)
        adapter.train()

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return len(self.losses)

    @property
    def seconds(self) -> float:
        """How long it has taken, in earlier processes too."""
        return time.monotonic() - self._began

    def start(self) -> None:
        """Begin with step 1."""
        self.first_loss = self.sample_loss()

    def take_step(self) -> None:
        """Take the next step.

        Raises:
            TrainingError: the gradient is no longer a number.
        """
        chosen = list(islice(self._batches, self._training.accumulation))
        answer_tokens = sum(len(row.answer) for batch in chosen for row in batch)
        total = 0.0
        for batch in chosen:
            with _autocast(self._adapter):
                loss = summed_answer_loss(self._adapter, pad(batch, self._pad_id, self._device)) / answer_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self._weights.values(), self._training.clip)
        if not torch.isfinite(norm):
            raise TrainingError(f"the gradient is no longer a number at step {self.step + 1}, loss {total}", self._mend)
        self._optimiser.step()
        self._schedule.step()
        self._optimiser.zero_grad()
        self.losses.append(total)
        self.tokens += sum(len(row) for batch in chosen for row in batch)

    def sample_loss(self) -> float:
        """The mean loss per answer token over the sample now.

        Raises:
            TrainingError: it is no longer a number.
        """
        loss = mean_answer_loss(self._adapter, self._sample, self._pad_id, self._device, self._training.batch)
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {self.step}", self._mend)
        return loss

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, as plain values and tensors.

        The order of the rows depends on the seed alone: the number of steps says which come next.
        """
        return {
            "weights": {name: weight.detach() for name, weight in self._weights.items()},
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state_dict(),
            "random": random_state(self._device),
            "losses": self.losses,
            "tokens": self.tokens,
            "first_loss": self.first_loss,
            "resumed": self.resumed,
            "seconds": self.seconds,
        }

    @torch.no_grad()
    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        for name, weight in self._weights.items():
            weight.copy_(state["weights"][name])
        self._optimiser.load_state_dict(state["optimiser"])
        self._schedule.load_state_dict(state["schedule"])
        self.losses, self.tokens, self.first_loss = state["losses"], state["tokens"], state["first_loss"]
        self.resumed = [*state["resumed"], self.step]
        self._began -= state["seconds"]
        for _ in range(self.step * self._training.accumulation):
            next(self._batches)
        restore_random_state(state["random"], self._device)


def _autocast(adapter: PeftModel) -> AbstractContextManager[object]:
    """Mixed precision where a bfloat16 base computes on CUDA; elsewhere PEFT's own casts do."""
    dtype = next(weight.dtype for weight in adapter.parameters() if not weight.requires_grad)
    if adapter.device.type == "cuda" and dtype == torch.bfloat16:
        return torch.autocast("cuda", dtype=dtype)
    return nullcontext()
