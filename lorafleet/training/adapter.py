"""One adapter from the rows of one task.

The loop is written out, of torch's and transformers' parts, instead of being transformers.Trainer's: inside a Ray Train
worker accelerate sees the process group of all workers and would average the gradients of different adapters, and the
base model has to come back unwrapped for the next adapter.
"""

import importlib.metadata
import shutil
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafleet.config import Settings
from lorafleet.models import fingerprint
from lorafleet.prompts import end_token
from lorafleet.storage import folder_in_one_step
from lorafleet.tasks import Corpus
from lorafleet.training.backends import choose_backend
from lorafleet.training.cards import AdapterCard, recorded, training_fingerprint, write_card
from lorafleet.training.checkpoints import Checkpoints, delete_checkpoints, flush
from lorafleet.training.optimisation import Optimisation
from lorafleet.training.randomness import seeded
from lorafleet.training.rows import encode_examples

OnStep = Callable[[int, float], None]
LOSS_DIGITS = 4


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

    Where an earlier process was stopped with the same rows, settings and base model, its checkpoint is gone on from: the
    adapter is the same, to the bit on the same CPU, as if nothing had happened.

    Args:
        model: the base model, frozen; the backend's `load` gives it. Afterwards it can train the next adapter.
        folder: where the adapter comes to lie; an older one there is replaced when the new one is whole. Nobody else
            trains an adapter for that place at the same time.
        on_step: called after every optimiser step with its number (from 1) and the loss of its batch.

    Raises:
        TrainingError: the backend cannot work here, or the loss is no longer a number.
    """
    training = settings.training
    backend = choose_backend(settings)
    rows = encode_examples(tokenizer, end_token(tokenizer, model), corpus.examples, training.max_tokens)
    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int)
    checkpoints = Checkpoints(folder, training_fingerprint(corpus, settings, backend.name))
    sweep(folder)
    with seeded(training.seed), folder_in_one_step(folder) as beside:
        adapter = backend.attach(model, training)
        try:
            run = Optimisation(adapter, rows, pad_id, training)
            _finish(run, checkpoints, training.checkpoint_steps, on_step)
            last_loss = run.sample_loss()
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
            steps=run.steps,
            first_loss=run.first_loss,
            last_loss=last_loss,
            seconds=round(run.seconds, 2),
            tokens=run.tokens,
            versions={package: importlib.metadata.version(package) for package in ("torch", "transformers", "peft")},
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            losses=[round(loss, LOSS_DIGITS) for loss in run.losses],
            resumed=run.resumed,
        )
        write_card(beside, card)
        for file in beside.iterdir():
            flush(file)
    flush(folder.parent)
    delete_checkpoints(folder)
    return card


def sweep(folder: Path) -> None:
    """Delete what a process that was killed had begun to put in the place of the adapter in `folder`."""
    for debris in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(debris, ignore_errors=True)


def _finish(run: Optimisation, checkpoints: Checkpoints, every: int, on_step: OnStep) -> None:
    """Start, or go on from the newest checkpoint, and take all steps that are left."""
    saved = checkpoints.newest()
    if saved is None:
        run.start()
    else:
        run.resume(saved)
    while run.step < run.steps:
        run.take_step()
        # After the last step comes the adapter itself.
        if every and run.step % every == 0 and run.step < run.steps:
            checkpoints.write(run.step, run.state())
        on_step(run.step, run.losses[-1])


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
