"""Tokens trained in a second by our loop, against transformers' Trainer on the same adapter, rows and batches.

    python -m benchmarks.train                                   the settings' base model, the sample pack's rows
    python -m benchmarks.train --rank 64 --tokens 256 --steps 200 --backend all     (on a GPU)

All sides train the same LoRA layers on the same rows with the same optimiser and schedule, each on a base model of its own.
A token is one that a step saw; padding does not count. The time is that of all steps after the first few, which load kernels
and capture graphs for the shapes that come; those of the whole training, loading of the base model left out, are given too.
"""

import gc
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from benchmarks.fleet import synchronise
from benchmarks.report import tell
from lorafleet.config import Settings, Training, load_settings
from lorafleet.errors import TrainingError
from lorafleet.prompts import end_token
from lorafleet.tasks import Corpus, joined, load_catalogue, load_corpus
from lorafleet.training import choose_backend, train_adapter
from lorafleet.training.backends import PeftBackend
from lorafleet.training.rows import IGNORED, TokenRow, encode_examples, endless_batches

TRAINER = "transformers' Trainer, PEFT"
UNTIMED_SHARE = 0.2
WATCH_SECONDS = 0.05
MIB = 2**20

console = Console(stderr=True)


@dataclass(frozen=True)
class Measured:
    """One side.

    Attributes:
        tokens_per_second: over the steps that are timed.
        seconds: of the whole training, saving included.
        peak_mib: with the base model: on a GPU what torch held of it at most, on a CPU what the process held.
        loss: mean of all steps.
        padding: what share of the batches is padding.
    """

    side: str
    tokens_per_second: float
    seconds: float
    peak_mib: float
    loss: float
    padding: float


def main(
    model: Annotated[str, typer.Option(help="a reference as in models.base; base for the settings' own")] = "base",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    backend: Annotated[str, typer.Option(help="of ours: peft, unsloth, or all that work here")] = "all",
    rank: Annotated[int, typer.Option(help="of the adapter")] = 16,
    batch: Annotated[int, typer.Option(help="rows of a batch")] = 4,
    accumulation: Annotated[int, typer.Option(help="batches of a step")] = 1,
    tokens: Annotated[int, typer.Option(help="of the longest row")] = 96,
    steps: Annotated[int, typer.Option(help="to take on each side")] = 12,
    tasks: Annotated[
        str, typer.Option(help="whose rows are trained on, mixed; the sample pack's without --hub-root")
    ] = "piqa,copa",
    hub_root: Annotated[Path | None, typer.Option(help="a folder laid out like the Hugging Face hub")] = None,
    graphs: Annotated[bool, typer.Option(help="CUDA graphs in ours")] = True,
    quantization: Annotated[str, typer.Option(help="none or 4bit, in ours")] = "none",
    to: Annotated[Path | None, typer.Option("--json", help="write what was measured to this file")] = None,
) -> None:
    """Measure all sides and print a table."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    training = {
        "rank": rank,
        "batch": batch,
        "accumulation": accumulation,
        "max_tokens": tokens,
        "max_steps": steps,
        "checkpoint_steps": 0,
        "backend": "peft",
        "cuda_graphs": graphs,
        "quantization": quantization,
    }
    source = {"source": "hub", "hub_root": str(hub_root)} if hub_root else {"source": "samples"}
    models = {"device": device, **({} if model == "base" else {"base": model})}
    settings = load_settings(models=models, tasks=source, training=training)
    corpus = _mixed(settings, tasks.split(","))
    sides = [_trainer(settings, corpus)] if quantization == "none" else []
    for name in ("peft", "unsloth") if backend == "all" else (backend,):
        ours = settings.model_copy(update={"training": settings.training.model_copy(update={"backend": name})})
        try:
            sides.append(_ours(ours, corpus))
        except TrainingError as error:
            console.print(f"without {name}: {error}", style="yellow")
    first = sides[0].tokens_per_second
    table = [
        (
            side.side,
            side.tokens_per_second,
            side.tokens_per_second / first,
            side.seconds,
            side.peak_mib,
            side.padding,
            f"{side.loss:.4f}",
        )
        for side in sides
    ]
    title = f"{settings.models.base}, rank {rank}, {steps} steps of {accumulation} x {batch} rows of at most {tokens} tokens"
    columns = ("side", "tokens/s", "/ first", "s in all", "peak MiB", "padding", "mean loss")
    tell(title, columns, table, {"title": title, "sides": [asdict(side) for side in sides]}, to)


def _mixed(settings: Settings, tasks: Sequence[str]) -> Corpus:
    catalogue = load_catalogue(settings.tasks)
    return joined("mixed", [load_corpus(catalogue[task], "train", settings.tasks) for task in tasks], settings.training.seed)


def _ours(settings: Settings, corpus: Corpus) -> Measured:
    training = settings.training
    model, tokenizer = choose_backend(settings).load(settings)
    clock = _Clock(training)
    with _peak(model.device) as peak, tempfile.TemporaryDirectory() as folder:
        card = train_adapter(model, tokenizer, corpus, settings, "benchmark", Path(folder) / "adapter", clock.step)
    rows = encode_examples(tokenizer, end_token(tokenizer, model), corpus.examples, training.max_tokens)
    taken = islice(endless_batches(rows, training.batch, training.seed), clock.steps * training.accumulation)
    for batch in taken:
        clock.count(batch)
    name = f"ours, {training.backend}{', 4 bits' if training.quantization == '4bit' else ''}"
    return clock.measured(name, card.seconds, peak[0], statistics.fmean(card.losses))


def _trainer(settings: Settings, corpus: Corpus) -> Measured:
    """What a user would write without us: transformers' Trainer, rows in any order, padded to the longest of their batch."""
    training = settings.training
    model, tokenizer = PeftBackend("").load(settings)
    rows = encode_examples(tokenizer, end_token(tokenizer, model), corpus.examples, training.max_tokens)
    clock = _Clock(training)

    def collate(batch: list[TokenRow]) -> dict[str, torch.Tensor]:
        clock.count(batch)
        width = max(map(len, batch))
        gaps = [width - len(row) for row in batch]
        ids = [[*row.prompt, *row.answer] + [tokenizer.pad_token_id] * gap for row, gap in zip(batch, gaps, strict=True)]
        mask = [[1] * len(row) + [0] * gap for row, gap in zip(batch, gaps, strict=True)]
        labels = [
            [IGNORED] * len(row.prompt) + [*row.answer] + [IGNORED] * gap for row, gap in zip(batch, gaps, strict=True)
        ]
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(mask),
            "labels": torch.tensor(labels),
        }

    class Timer(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            clock.step(state.global_step, math.nan)

    with _peak(model.device) as peak, tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        torch.manual_seed(training.seed)
        config = LoraConfig(
            r=training.rank, lora_alpha=int(training.alpha), target_modules=training.modules, task_type="CAUSAL_LM"
        )
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=training.batch,
            gradient_accumulation_steps=training.accumulation,
            max_steps=clock.steps,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            max_grad_norm=training.clip,
            warmup_steps=min(training.warmup_steps, clock.steps // 3),
            lr_scheduler_type="cosine",
            optim="adamw_torch_fused",
            bf16=model.dtype == torch.bfloat16,
            seed=training.seed,
            use_cpu=model.device.type == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        wrapped = get_peft_model(model, config)
        trainer = Trainer(wrapped, arguments, data_collator=collate, train_dataset=rows, callbacks=[Timer()])
        loss = trainer.train().training_loss
        wrapped.save_pretrained(folder)
        seconds = time.perf_counter() - started
    return clock.measured(TRAINER, seconds, peak[0], loss)


class _Clock:
    """When the steps of a side ended, and what they saw."""

    def __init__(self, training: Training) -> None:
        assert training.max_steps is not None
        self.steps, self._accumulation = training.max_steps, training.accumulation
        self._untimed = math.ceil(UNTIMED_SHARE * self.steps)
        self._ends: dict[int, float] = {}
        self._tokens: list[int] = []
        self._places: list[int] = []

    def step(self, number: int, loss: float) -> None:
        """A step has ended."""
        if number in (self._untimed, self.steps):
            synchronise()
        self._ends[number] = time.perf_counter()

    def count(self, batch: Sequence[TokenRow]) -> None:
        """The next batch, in order."""
        self._tokens.append(sum(map(len, batch)))
        self._places.append(len(batch) * max(map(len, batch)))

    def measured(self, side: str, seconds: float, peak: float, loss: float) -> Measured:
        """What came of it."""
        begin, end = self._untimed * self._accumulation, self.steps * self._accumulation
        timed = self._ends[self.steps] - self._ends[self._untimed]
        padding = 1 - sum(self._tokens[:end]) / sum(self._places[:end])
        measured = Measured(side, sum(self._tokens[begin:end]) / timed, seconds, peak, loss, padding)
        console.print(f"{side}: {measured.tokens_per_second:,.0f} tokens/s", style="dim")
        return measured


@contextmanager
def _peak(device: torch.device) -> Iterator[list[float]]:
    """A list that holds, after the block, the memory at its peak in MiB."""
    found: list[float] = []
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        yield found
        found.append(torch.cuda.max_memory_reserved() / MIB)
        return
    process, ended, seen = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not ended.wait(WATCH_SECONDS):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield found
    ended.set()
    watcher.join()
    found.append(max(seen) / MIB)


if __name__ == "__main__":
    typer.run(main)
