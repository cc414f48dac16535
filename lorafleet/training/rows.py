"""Examples as token ids, and their batches."""

import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from lorafleet.config import Training
from lorafleet.prompts import cut_middle, encode_answer, encode_prompt
from lorafleet.tasks import Example

IGNORED = -100
SHORTEST_PROMPT = 8
BUCKET_BATCHES = 32


@dataclass(frozen=True)
class TokenRow:
    """One example as token ids.

    Attributes:
        prompt: the prompt's ids, with BOS where the tokenizer adds one.
        answer: the ids of the answer and the end token; the loss is taken on these alone.
        cut: whether the prompt lost its middle.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    cut: bool

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class BatchShape:
    """How large a batch is.

    Attributes:
        rows: rows side by side.
        tokens: of the longest row.
        columns: columns whose next token belongs to an answer in some row.
    """

    rows: int
    tokens: int
    columns: int


@dataclass(frozen=True)
class TokenBatch:
    """Rows side by side, padded on the right.

    A causal model needs no mask then: no token sees what stands behind it. (Padding on the left makes rows of the mask
    without a single open column, and the gradients of CUDA's attention kernels are NaN for those.)

    Attributes:
        input_ids: int64 (rows, tokens).
        columns: int64 (n), the columns whose next token belongs to an answer in some row, in order.
        targets: int64 (rows, n), those next tokens; IGNORED where they belong to no answer.
    """

    input_ids: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device) -> "TokenBatch":
        """The batch on `device`; a GPU takes it while it still computes what it was given before."""
        if device.type != "cuda":
            return self
        parts = (self.input_ids, self.columns, self.targets)
        return TokenBatch(*(part.pin_memory().to(device, non_blocking=True) for part in parts))


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, end: int, examples: Sequence[Example], max_tokens: int
) -> list[TokenRow]:
    """The examples as token ids, at most `max_tokens` each.

    A prompt that is too long is cut in its middle; the answer never is (beside a very long one, SHORTEST_PROMPT tokens of
    the prompt stay, and the row is longer than `max_tokens`).
    """
    rows = []
    for example in examples:
        answer = [*encode_answer(tokenizer, example.answer), end]
        whole = encode_prompt(tokenizer, example.prompt, sys.maxsize)
        prompt = cut_middle(whole, max(max_tokens - len(answer), SHORTEST_PROMPT))
        rows.append(TokenRow(tuple(prompt), tuple(answer), cut=len(prompt) < len(whole)))
    return rows


def optimiser_steps(rows: int, training: Training) -> int:
    """How many optimiser steps an adapter takes; `max_steps`, where given, wins over `epochs`."""
    return training.max_steps or training.epochs * math.ceil(rows / (training.batch * training.accumulation))


def endless_batches(rows: Sequence[TokenRow], size: int, seed: int) -> Iterator[list[TokenRow]]:
    """Batches of rows of like length, epoch after epoch; the order depends on the seed alone.

    Each epoch is shuffled, sorted by length within buckets of BUCKET_BATCHES batches, and its batches shuffled again:
    little padding, and still another mixture in every epoch.
    """
    order = random.Random(seed)
    while True:
        shuffled = order.sample(list(rows), len(rows))
        bucket = size * BUCKET_BATCHES
        sorted_rows = [
            row for start in range(0, len(rows), bucket) for row in sorted(shuffled[start : start + bucket], key=len)
        ]
        batches = [sorted_rows[start : start + size] for start in range(0, len(rows), size)]
        order.shuffle(batches)
        yield from batches


def shape_of(rows: Sequence[TokenRow]) -> BatchShape:
    """The least shape that holds the rows."""
    return BatchShape(len(rows), max(len(row) for row in rows), len(_answer_columns(rows)))


def pad(rows: Sequence[TokenRow], pad_id: int, shape: BatchShape | None = None) -> TokenBatch:
    """The rows as tensors on the CPU.

    Args:
        shape: of the batch, where it is to be larger than the rows need; what is added has no part in the loss.
    """
    columns = _answer_columns(rows)
    shape = shape or shape_of(rows)
    input_ids = torch.full((shape.rows, shape.tokens), pad_id)
    targets = torch.full((shape.rows, shape.columns), IGNORED)
    place = {column: number for number, column in enumerate(columns)}
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = torch.tensor([*row.prompt, *row.answer])
        first = place[len(row.prompt) - 1]
        targets[number, first : first + len(row.answer)] = torch.tensor(row.answer)
    return TokenBatch(input_ids, torch.tensor(columns + [0] * (shape.columns - len(columns))), targets)


def _answer_columns(rows: Sequence[TokenRow]) -> list[int]:
    return sorted({column for row in rows for column in range(len(row.prompt) - 1, len(row) - 1)})
