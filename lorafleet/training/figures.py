"""What training will take, known beforehand: tokens of the rows, weights of the model and of an adapter on it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from lorafleet.config import Settings, Training
from lorafleet.errors import ModelError
from lorafleet.models import locate, unpacked
from lorafleet.prompts import encode_answer, encode_prompt
from lorafleet.tasks import Corpus, Example
from lorafleet.training.rows import SHORTEST_PROMPT, optimiser_steps

FLOAT32_BYTES = 4
# Weights and the optimiser's two moments of each.
CHECKPOINT_ADAPTERS = 3
# Two are kept while the next is written.
CHECKPOINTS = 3


@dataclass(frozen=True)
class RowFigures:
    """The rows of a task as they will be trained on.

    Attributes:
        cut: rows whose prompt is longer than `training.max_tokens` allows, and loses its middle.
        longest: tokens of the longest row before it is cut, in `longest_example`.
        steps: optimiser steps.
        tokens: that all steps together will see, padding not counted.
    """

    rows: int
    cut: int
    longest: int
    longest_example: Example
    steps: int
    tokens: int


@dataclass(frozen=True)
class ModelSize:
    """How large the base model and an adapter on it are.

    Attributes:
        parameters: of the base model; lora_parameters of an adapter.
        unknown: names in `training.modules` that no linear layer of the model has.
        linear: the names of all its linear layers.
    """

    parameters: int
    lora_parameters: int
    unknown: tuple[str, ...]
    linear: tuple[str, ...]

    @property
    def adapter_bytes(self) -> int:
        """What an adapter takes on disk."""
        return self.lora_parameters * FLOAT32_BYTES

    def disk_bytes(self, adapters: int, at_once: int, checkpoints: bool) -> int:
        """What so many adapters take on disk at most, while `at_once` of them are trained."""
        return self.adapter_bytes * (adapters + checkpoints * at_once * CHECKPOINTS * CHECKPOINT_ADAPTERS)

    def memory_bytes(self, training: Training, number_format: torch.dtype) -> int:
        """What a worker needs at least: weights, and the adapter with its gradients and the optimiser's moments.

        What lies between the layers comes on top; it depends on the rows.
        """
        width = 0.5 if training.quantization == "4bit" else number_format.itemsize
        return int(self.parameters * width) + self.lora_parameters * FLOAT32_BYTES * (1 + CHECKPOINT_ADAPTERS)


def row_figures(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, training: Training) -> RowFigures:
    """Count the tokens of a task's rows as training will cut them."""
    examples = corpus.examples
    prompts, answers = _prompt_lengths(tokenizer, examples), _answer_lengths(tokenizer, examples)
    kept = [
        min(prompt, max(training.max_tokens - answer, SHORTEST_PROMPT))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(range(len(examples)), key=whole.__getitem__)
    steps = optimiser_steps(len(examples), training)
    return RowFigures(
        rows=len(examples),
        cut=sum(some < prompt for some, prompt in zip(kept, prompts, strict=True)),
        longest=whole[longest],
        longest_example=examples[longest],
        steps=steps,
        tokens=round(steps * training.batch * training.accumulation * (sum(kept) + sum(answers)) / len(examples)),
    )


def model_size(settings: Settings) -> ModelSize:
    """Count the weights of the base model and of an adapter on it, from the configuration alone.

    Raises:
        ModelError: it cannot be read.
    """
    models = settings.models
    try:
        config = AutoConfig.from_pretrained(unpacked(locate(models.base)), revision=models.base_revision or "main")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the base model {models.base!r}: {' '.join(str(error).split())}") from None
    linear = [(name.rsplit(".", 1)[-1], layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    modules = settings.training.modules
    names = dict.fromkeys(name for name, _ in linear)
    wrapped = [layer.in_features + layer.out_features for name, layer in linear if name in modules]
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        lora_parameters=settings.training.rank * sum(wrapped),
        unknown=tuple(name for name in modules if name not in names),
        linear=tuple(names),
    )


def _prompt_lengths(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[int]:
    """The tokens of every prompt, as `encode_prompt` makes them, in one call: that is many times faster."""
    begin = encode_prompt(tokenizer, "", 1)
    encoded: list[list[int]] = tokenizer([example.prompt for example in examples], add_special_tokens=False)["input_ids"]
    return [len(ids) + (len(begin) if ids[:1] != begin else 0) for ids in encoded]


def _answer_lengths(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[int]:
    """The tokens of every answer, with its end token."""
    lengths = {answer: len(encode_answer(tokenizer, answer)) + 1 for answer in {example.answer for example in examples}}
    return [lengths[example.answer] for example in examples]
