"""One adapter from the rows of one task.

The loop is written out, of torch's and transformers' parts, instead of being transformers.Trainer's: inside a Ray Train
worker accelerate sees the process group of all workers and would average the gradients of different adapters, and the
base model has to come back unwrapped for the next adapter.
"""

import importlib.metadata
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from lorafleet.config import Settings, Training
from lorafleet.errors import TrainingError
from lorafleet.models import fingerprint
from lorafleet.prompts import end_token
from lorafleet.storage import folder_in_one_step
from lorafleet.tasks import Corpus
from lorafleet.training.backends import choose_backend
from lorafleet.training.cards import AdapterCard, recorded, write_card
from lorafleet.training.loss import mean_answer_loss, summed_answer_loss
from lorafleet.training.rows import TokenRow, encode_examples, endless_batches, optimiser_steps, pad

OnStep = Callable[[int, float], None]
LOSS_SAMPLE_ROWS = 8


def train_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    settings: Settings,
    name: str,
    folder: Path,
    on_step: OnStep,
) -> AdapterCard:
    """Train one adapter on a loaded base model, save it in PEFT's format, and give the base model back as it was.

    Args:
        model: the base model, frozen; the backend's `load` gives it. Afterwards it can train the next adapter.
        folder: where the adapter comes to lie; an older one there is replaced when the new one is whole.
        on_step: called after every optimiser step with its number (from 1) and the loss of its batch.

    Raises:
        TrainingError: the backend cannot work here, or the loss is no longer a number.
    """
    started = time.monotonic()
    training = settings.training
    backend = choose_backend(settings)
    rows = encode_examples(tokenizer, end_token(tokenizer, model), corpus.examples, training.max_tokens)
    sample = random.Random(training.seed).sample(rows, min(LOSS_SAMPLE_ROWS, len(rows)))
    pad_id = tokenizer.pad_token_id
    device = model.device
    assert isinstance(pad_id, int)
    # The random numbers of the caller stay as they are; those in here depend on the seed alone.
    with torch.random.fork_rng(), folder_in_one_step(folder) as beside:
        torch.manual_seed(training.seed)
        adapter = backend.attach(model, training)
        try:
            first_loss = mean_answer_loss(adapter, sample, pad_id, device, training.batch)
            tokens = _optimise(adapter, rows, pad_id, training, on_step)
            last_loss = mean_answer_loss(adapter, sample, pad_id, device, training.batch)
            _save(adapter, settings.models.base, beside)
        finally:
            _take_off(adapter, model)
        card = AdapterCard(
            name=name,
            task=corpus.task.name,
            family=corpus.task.family,
            corpus=corpus.fingerprint,
            source=corpus.source,
            rows=len(rows),
            cut_rows=sum(row.cut for row in rows),
            training=recorded(training),
            base=settings.models.base,
            base_fingerprint=fingerprint(settings.models.base, settings.models.base_revision),
            backend=f"{backend.name}: {backend.reason}",
            steps=optimiser_steps(len(rows), training),
            first_loss=first_loss,
            last_loss=last_loss,
            seconds=round(time.monotonic() - started, 2),
            tokens=tokens,
            versions={package: importlib.metadata.version(package) for package in ("torch", "transformers", "peft")},
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        write_card(beside, card)
    return card


def _optimise(adapter: PeftModel, rows: list[TokenRow], pad_id: int, training: Training, on_step: OnStep) -> int:
    """Take the optimiser steps; how many tokens they saw."""
    steps = optimiser_steps(len(rows), training)
    weights = [weight for weight in adapter.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=training.learning_rate, weight_decay=training.weight_decay)
    # A small corpus has fewer steps than the warm-up asks for, and would never reach the learning rate.
    warmup = min(training.warmup_steps, steps // 3)
    schedule = get_scheduler("cosine", optimiser, num_warmup_steps=warmup, num_training_steps=steps)
    batches = endless_batches(rows, training.batch, training.seed)
    device = weights[0].device
    tokens = 0
    adapter.train()
    for step in range(1, steps + 1):
        chosen = list(islice(batches, training.accumulation))
        answer_tokens = sum(len(row.answer) for batch in chosen for row in batch)
        total = 0.0
        for batch in chosen:
            with _autocast(adapter):
                loss = summed_answer_loss(adapter, pad(batch, pad_id, device)) / answer_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(weights, training.clip)
        if not torch.isfinite(norm):
            raise TrainingError(
                f"the gradient is no longer a number at step {step}, loss {total}",
                f"Lower training.learning_rate = {training.learning_rate:g}, or set training.dtype to float32",
            )
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        tokens += sum(len(row) for batch in chosen for row in batch)
        on_step(step, total)
    return tokens


def _autocast(adapter: PeftModel) -> AbstractContextManager[object]:
    """Mixed precision where a bfloat16 base computes on CUDA; elsewhere PEFT's own casts do."""
    dtype = next(weight.dtype for weight in adapter.parameters() if not weight.requires_grad)
    if adapter.device.type == "cuda" and dtype == torch.bfloat16:
        return torch.autocast("cuda", dtype=dtype)
    return nullcontext()


def _save(adapter: PeftModel, base: str, folder: Path) -> None:
    """Write weights and configuration; the base model is named as the settings name it, not by where it lies here."""
    config = adapter.peft_config["default"]
    assert isinstance(config, LoraConfig)
    config.base_model_name_or_path = base
    config.target_modules = sorted(config.target_modules or ())  # PEFT holds a set, whose order differs from run to run.
    # Embeddings are never trained; looking for changes in them would ask the hub.
    adapter.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def _take_off(adapter: PeftModel, model: PreTrainedModel) -> None:
    """Take the LoRA layers out of the base model, and freeze it again."""
    adapter.unload()
    if model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()  # type: ignore[no-untyped-call]
    model.requires_grad_(False)
    model.train(False)
