"""The optimiser steps of one adapter, which can stop after any of them and go on in another process."""

import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import get_scheduler

from lorafleet.config import Training
from lorafleet.errors import TrainingError
from lorafleet.training.graphs import GraphedPasses
from lorafleet.training.loss import mean_answer_loss
from lorafleet.training.passes import Passes
from lorafleet.training.randomness import random_state, restore_random_state
from lorafleet.training.ranks import ELSEWHERE, Ranks
from lorafleet.training.rows import TokenRow, endless_batches, optimiser_steps

AddBatch = Callable[[Sequence[TokenRow], torch.Tensor], None]
LOSS_SAMPLE_ROWS = 8
SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class Step:
    """What came of an optimiser step.

    Attributes:
        number: from 1.
        loss: mean per answer token of its batch, before the step.
    """

    number: int
    loss: float
    learning_rate: float


class Optimisation:
    """AdamW under a cosine schedule over endless batches: `start` it or `resume` it, then take its steps.

    Every process of `ranks` takes them, each with its part of every step's rows; the gradients are added up.

    Attributes:
        steps: how many there are to take.
        step: how many were taken.
        losses: the mean loss per answer token of every step's batch, before the step. A GPU's last step is still missing
            there while it computes the next.
        tokens: that the steps saw, padding not counted.
        first_loss: mean loss per answer token over a fixed sample of the rows before the first step.
        resumed: the steps that earlier processes had come to, as far as they were kept.
    """

    def __init__(self, passes: Passes, rows: list[TokenRow], training: Training, ranks: Ranks) -> None:
        self.steps = optimiser_steps(len(rows), training)
        self.step = 0
        self.losses: list[float] = []
        self.tokens = 0
        self.first_loss = math.nan
        self.resumed: list[int] = []
        self._began = time.monotonic()
        self._mend = f"Lower training.learning_rate = {training.learning_rate:g}, or set training.dtype to float32"
        self.ranks = ranks
        self._passes, self._weights, self._training = passes, passes.weights, training
        self._device = self._weights.master.device
        self._add = _adding(passes, training, ranks)
        self._sample = random.Random(training.seed).sample(rows, min(LOSS_SAMPLE_ROWS, len(rows)))
        self._optimiser = torch.optim.AdamW(
            [self._weights.master], lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
        )
        # A small corpus has fewer steps than the warm-up asks for, and would never reach the learning rate.
        warmup = min(training.warmup_steps, self.steps // 3)
        self._schedule = get_scheduler("cosine", self._optimiser, num_warmup_steps=warmup, num_training_steps=self.steps)
        self._batches = endless_batches(rows, training.batch, training.seed)
        self._computing: _Computing | None = None
        self._news: list[Step] = []
        passes.adapter.train()

    @property
    def seconds(self) -> float:
        """How long it has taken, in earlier processes too."""
        return time.monotonic() - self._began

    def start(self) -> None:
        """Begin with step 1."""
        self.first_loss = self.sample_loss()

    def level(self) -> None:
        """Begin with the same weights in all processes."""
        self.ranks.take_from_first(self._weights.master)
        self._weights.spread()

    def failing_together(self) -> AbstractContextManager[None]:
        """A block between two steps: if it fails here, the other processes fail in their next step."""
        return self.ranks.failing_instead_of(self._weights.sums)

    def take_step(self) -> None:
        """Take the next step.

        Raises:
            TrainingError: the gradient is no longer a number, here or one step before, or another process failed.
        """
        chosen = list(islice(self._batches, self._training.accumulation))
        with self.failing_together():
            if self.ranks.count > 1 and self._training.dropout:
                torch.manual_seed(self.ranks.count * (self._training.seed * SEED_STRIDE + self.step) + self.ranks.rank)
            answer_tokens = sum(len(row.answer) for batch in chosen for row in batch)
            answers = torch.full((), float(answer_tokens), device=self._device)
            for batch in self.ranks.share(chosen):
                self._add(batch, answers)
        self.read()
        self.ranks.add_up(self._weights.sums)
        norm = torch.nn.utils.clip_grad_norm_([self._weights.master], self._training.clip)
        figures = torch.stack([self._weights.loss, norm, self._weights.failures])
        self._optimiser.step()
        self._weights.spread()
        self._weights.sums.zero_()
        self.step += 1
        self.tokens += sum(len(row) for batch in chosen for row in batch)
        self._computing = _Computing(self.step, self._schedule.get_last_lr()[0], figures)
        self._schedule.step()
        if self._device.type != "cuda":
            self.read()

    def read(self) -> None:
        """Wait for the last step, and see what came of it.

        Raises:
            TrainingError: the gradient is no longer a number, or another process failed.
        """
        if self._computing is None:
            return
        computed, self._computing = self._computing, None
        loss, norm, failures = computed.figures()
        if failures:
            raise TrainingError(*ELSEWHERE)
        if not math.isfinite(norm):
            raise TrainingError(f"the gradient is no longer a number at step {computed.step}, loss {loss}", self._mend)
        self.losses.append(loss)
        self._news.append(Step(computed.step, loss, computed.learning_rate))

    def news(self) -> list[Step]:
        """The steps of which it is known what came of them, and was not when this was last asked."""
        news, self._news = self._news, []
        return news

    def sample_loss(self) -> float:
        """The mean loss per answer token over the sample now.

        Raises:
            TrainingError: it is no longer a number.
        """
        with self._passes.precision():
            loss = mean_answer_loss(
                self._passes.adapter, self._sample, self._passes.pad_id, self._device, self._training.batch
            )
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {self.step}", self._mend)
        return loss

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, as plain values and tensors; what came of the last one has been read.

        The order of the rows depends on the seed alone: the number of steps says which come next.
        """
        return {
            "weights": self._weights.master.detach(),
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
        self._weights.master.copy_(state["weights"])
        self._weights.spread()
        self._optimiser.load_state_dict(state["optimiser"])
        self._schedule.load_state_dict(state["schedule"])
        self.losses, self.tokens, self.first_loss = state["losses"], state["tokens"], state["first_loss"]
        self.step = len(self.losses)
        self.resumed = [*state["resumed"], self.step]
        self._began -= state["seconds"]
        for _ in range(self.step * self._training.accumulation):
            next(self._batches)
        restore_random_state(state["random"], self._device)


class _Computing:
    """A step that the device may still be computing; its figures come to the host as soon as they are there."""

    def __init__(self, step: int, learning_rate: float, figures: torch.Tensor) -> None:
        self.step, self.learning_rate = step, learning_rate
        self._there: torch.cuda.Event | None = None
        self._figures = figures
        if figures.is_cuda:
            self._figures = torch.empty(figures.shape, pin_memory=True)
            self._figures.copy_(figures, non_blocking=True)
            self._there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._there.record()

    def figures(self) -> list[float]:
        """Wait for them."""
        if self._there is not None:
            self._there.synchronize()
        return [float(figure) for figure in self._figures]


def _adding(passes: Passes, training: Training, ranks: Ranks) -> AddBatch:
    """How the batches of a step are computed."""
    plain = not training.dropout and not training.gradient_checkpointing and training.quantization == "none"
    if not (training.cuda_graphs and plain and passes.capturable and passes.device.type == "cuda"):
        return passes.add
    rows = min(training.batch, math.ceil(training.batch * training.accumulation / ranks.count))
    return GraphedPasses(passes, rows).add
