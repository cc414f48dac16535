"""One adapter from the rows of one task.

The loop is written out, of torch's and transformers' parts, instead of being transformers.Trainer's: it goes on after any
step to the same bits, replays CUDA graphs, and gives the base model back unwrapped for the next adapter.
"""

import importlib.metadata
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime, timezone
from glob import escape
from pathlib import Path

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafleet.config import Settings, Training
from lorafleet.models import fingerprint
from lorafleet.prompts import end_token
from lorafleet.storage import folder_in_one_step
from lorafleet.tasks import Corpus
from lorafleet.training.attention import without_masks
from lorafleet.training.backends import Backend, choose_backend
from lorafleet.training.cards import AdapterCard, recorded, training_fingerprint, write_card
from lorafleet.training.checkpoints import Checkpoints, delete_checkpoints, read_checkpoint
from lorafleet.training.optimisation import Optimisation
from lorafleet.training.passes import Passes
from lorafleet.training.randomness import seeded
from lorafleet.training.ranks import Ranks
from lorafleet.training.rows import TokenRow, encode_examples
from lorafleet.training.tracking import tracked

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

    Where torch's default process group has several processes, all of them call this with the same arguments, and train the
    adapter together: the rows of every step are shared out, and the sums are those of one process. The first one writes; all
    of them see the same `folder`.

    Args:
        model: the base model, frozen; the backend's `load` gives it. Afterwards it can train the next adapter.
        folder: where the adapter comes to lie; an older one there is replaced when the new one is whole. Nobody else
            trains an adapter for that place at the same time.
        on_step: called after every optimiser step with its number (from 1) and the loss of its batch; where a GPU
            computes, one step later.

    Raises:
        TrainingError: the backend cannot work here, the loss is no longer a number, or another process failed.
    """
    training, ranks = settings.training, Ranks()
    backend = choose_backend(settings)
    work = training_fingerprint(corpus, settings, backend.name)
    ranks.check_same((name, work))
    checkpoints = Checkpoints(folder, work)
    with ranks.agreed(model.device):
        rows = encode_examples(tokenizer, end_token(tokenizer, model), corpus.examples, training.max_tokens)
        newest = _tidied(folder, checkpoints) if ranks.first else None
    newest = ranks.told_by_first(newest)
    card = None
    with ExitStack() as stack:
        with ranks.agreed(model.device):
            passes = _begin(stack, backend, model, tokenizer, training, rows)
            run = Optimisation(passes, rows, training, ranks)
            if newest is None:
                run.start()
            else:
                run.resume(read_checkpoint(newest))
            track = stack.enter_context(tracked(settings, name, run.step, ranks.first))

        def tell() -> None:
            for step in run.news():
                track.step(step.number, step.loss, step.learning_rate)
                on_step(step.number, step.loss)

        run.level()
        _take_steps(run, checkpoints, training.checkpoint_steps, tell)
        with ranks.agreed(model.device):
            run.read()
            tell()
            if ranks.first:
                card = _keep(run, passes, rows, corpus, settings, name, backend, folder)
                track.end(card)
    card = ranks.told_by_first(card)
    assert card is not None
    return card


def sweep(folder: Path) -> None:
    """Delete what a process that was killed had begun to put in the place of the adapter in `folder`."""
    for debris in folder.parent.glob(f".{escape(folder.name)}.*"):
        shutil.rmtree(debris, ignore_errors=True)


def _tidied(folder: Path, checkpoints: Checkpoints) -> Path | None:
    """The checkpoint to go on from, where there is one; what killed processes left half written is deleted."""
    sweep(folder)
    return checkpoints.newest()


def _begin(
    stack: ExitStack,
    backend: Backend,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Training,
    rows: list[TokenRow],
) -> Passes:
    """Put LoRA layers into the base model, whose weights depend on the seed alone; `stack` takes them out."""
    stack.enter_context(seeded(training.seed, model.device))
    adapter = backend.attach(model, training)
    stack.callback(_take_off, adapter, model)
    if not backend.own_kernels:
        stack.enter_context(without_masks(model, max(len(row) for row in rows)))
    pad_id = tokenizer.pad_token_id
    if not isinstance(pad_id, int):
        pad_id = end_token(tokenizer, model)
    return Passes(adapter, pad_id, backend.own_kernels)


def _take_steps(run: Optimisation, checkpoints: Checkpoints, every: int, tell: Callable[[], None]) -> None:
    """Take all steps that are left."""
    while run.step < run.steps:
        run.take_step()
        if run.step == run.steps:
            # After the last step comes the adapter itself.
            return
        due = every > 0 and run.step % every == 0
        if due:
            run.read()
        with run.failing_together():
            if due and run.ranks.first:
                checkpoints.write(run.step, run.state())
            tell()


def _keep(
    run: Optimisation,
    passes: Passes,
    rows: list[TokenRow],
    corpus: Corpus,
    settings: Settings,
    name: str,
    backend: Backend,
    folder: Path,
) -> AdapterCard:
    """Bring the adapter and its card to their place, and delete its checkpoints."""
    last_loss = run.sample_loss()
    passes.weights.hand_back()
    with folder_in_one_step(folder) as beside:
        _save(passes.adapter, settings.models.base, beside)
        card = AdapterCard(
            name=name,
            task=corpus.name,
            family=corpus.family,
            corpus=corpus.fingerprint,
            source=corpus.source,
            rows=len(rows),
            cut_rows=sum(row.cut for row in rows),
            training=recorded(settings.training),
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
    delete_checkpoints(folder)
    return card


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
