"""Batches of prompts on one model: prefill, then decode step by step; a row that is done leaves the batch."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lorafleet.composition import AdapterPool, ComposedModel
from lorafleet.engine.requests import FinishReason, Generation, GenerationRequest, OptionScore, ScoreRequest
from lorafleet.engine.sampling import choose, seeded
from lorafleet.errors import RequestError
from lorafleet.prompts import encode_answer, encode_prompt, end_token

Note = Callable[[int], None]


@dataclass
class _Row:
    """A request on its way: what it has produced so far."""

    number: int
    request: GenerationRequest
    prompt_tokens: int
    draws: torch.Generator | None
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    seconds_to_first_token: float = 0.0
    text: str = ""
    finish_reason: FinishReason | None = None


@dataclass
class _Batch:
    """The rows of a batch with their cache, left-padded to one length."""

    cache: DynamicCache
    mask: torch.Tensor
    positions: torch.Tensor
    logits: torch.Tensor


class Engine:
    """Generates and scores on one base model with a pool of adapters. Safe to call from several threads, one at a time.

    Args:
        max_prompt_tokens: longer prompts are cut in their middle.
        batch: at most so many rows in one forward pass.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int = 2048, batch: int = 16
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._composed = ComposedModel(model)
        self._max_prompt_tokens, self._batch = max_prompt_tokens, batch
        self._end = end_token(tokenizer, model)
        self._device = next(model.parameters()).device
        self._lock = threading.Lock()

    @property
    def pool(self) -> AdapterPool:
        """The adapters that requests may name."""
        return self._composed.pool

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        return self._tokenizer

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Continue prompts, each under its own composition; the answers come in the order of the requests.

        Raises:
            RequestError: a prompt is empty, or a bound is out of range.
            UnknownAdapter, CompositionError: a composition cannot be made from the pool.
        """
        for request in requests:
            _check(request)
        answers: list[Generation] = []
        with self._lock, torch.inference_mode():
            for start in range(0, len(requests), self._batch):
                answers += self._generate_batch(requests[start : start + self._batch])
        return answers

    def score(self, requests: Sequence[ScoreRequest], note: Note | None = None) -> list[list[OptionScore]]:
        """The log-likelihood of every option of every request; a prompt is computed once for all its options.

        Args:
            note: is called with the number of requests done, batch by batch.
        """
        prompts = [self._encode(request.prompt) for request in requests]
        order = sorted(range(len(requests)), key=lambda number: -len(prompts[number]))
        scores: list[list[OptionScore]] = [[] for _ in requests]
        for start in range(0, len(order), self._batch):
            chosen = order[start : start + self._batch]
            with self._lock, torch.inference_mode():
                batch = self._score_batch([requests[number] for number in chosen], [prompts[number] for number in chosen])
            for number, row in zip(chosen, batch, strict=True):
                scores[number] = row
            if note is not None:
                note(len(chosen))
        return scores

    def _encode(self, prompt: str) -> list[int]:
        tokens = encode_prompt(self._tokenizer, prompt, self._max_prompt_tokens)
        if not tokens:
            raise RequestError("the prompt is empty", "Send some text", field="prompt")
        return tokens

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> _Batch:
        """Run the prompts, left-padded; the logits are those behind the last prompt token, [rows, vocabulary]."""
        length = max(len(prompt) for prompt in prompts)
        tokens = torch.zeros(len(prompts), length, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, length - len(prompt) :] = torch.tensor(prompt)
            mask[row, length - len(prompt) :] = 1
        mask = mask.to(self._device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        cache = DynamicCache(config=self._model.config)
        logits = self._forward(tokens.to(self._device), mask, positions, cache, logits_to_keep=1)
        return _Batch(cache, mask, positions[:, -1], logits[:, -1].float())

    def _forward(
        self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache, **options: Any
    ) -> torch.Tensor:
        output = self._model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **options
        )
        logits: torch.Tensor = output.logits
        return logits

    def _generate_batch(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        start = time.perf_counter()
        prompts = [self._encode(request.prompt) for request in requests]
        rows = [
            _Row(number, request, len(prompt), seeded(request.seed, self._device))
            for number, (request, prompt) in enumerate(zip(requests, prompts, strict=True))
        ]
        everyone = list(rows)
        plan = self.pool.plan([request.composition for request in requests])
        with self._composed.composed(plan):
            batch = self._prefill(prompts)
        while True:
            self._extend(rows, batch.logits, time.perf_counter() - start)
            going_on = [place for place, row in enumerate(rows) if row.finish_reason is None]
            if not going_on:
                break
            if len(going_on) < len(rows):
                keep = torch.tensor(going_on, device=self._device)
                rows = [rows[place] for place in going_on]
                plan = plan.select(keep)
                batch.cache.batch_select_indices(keep)
                batch = _Batch(batch.cache, batch.mask[keep], batch.positions[keep], batch.logits[keep])
            last = torch.tensor([[row.tokens[-1]] for row in rows], device=self._device)
            mask = torch.cat([batch.mask, batch.mask.new_ones(len(rows), 1)], dim=1)
            positions = batch.positions + 1
            with self._composed.composed(plan):
                logits = self._forward(last, mask, positions[:, None], batch.cache)
            batch = _Batch(batch.cache, mask, positions, logits[:, -1].float())
        return [_finished(row) for row in everyone]

    def _extend(self, rows: Sequence[_Row], logits: torch.Tensor, seconds: float) -> None:
        """Give every row its next token; rows that end get their reason."""
        log_probabilities = logits.log_softmax(dim=-1)
        for place, row in enumerate(rows):
            token = choose(logits[place], row.request.temperature, row.request.top_p, row.draws)
            if not row.tokens:
                row.seconds_to_first_token = seconds
            if token == self._end:
                row.finish_reason = "stop"
                continue
            row.tokens.append(token)
            row.log_probabilities.append(float(log_probabilities[place, token]))
            row.text = self._decode(row.tokens)
            stops = [row.text.index(stop) for stop in row.request.stop if stop in row.text]
            if stops:
                row.text = row.text[: min(stops)]
                row.finish_reason = "stop"
            elif len(row.tokens) >= row.request.max_tokens:
                row.finish_reason = "length"

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _score_batch(self, requests: Sequence[ScoreRequest], prompts: Sequence[Sequence[int]]) -> list[list[OptionScore]]:
        plan = self.pool.plan([request.composition for request in requests])
        with self._composed.composed(plan):
            batch = self._prefill(prompts)
        first = batch.logits.log_softmax(dim=-1)
        options = [[encode_answer(self._tokenizer, option) for option in request.options] for request in requests]
        totals = [[float(first[row, option[0]]) for option in row_options] for row, row_options in enumerate(options)]
        longer = [
            (row, place, option)
            for row, row_options in enumerate(options)
            for place, option in enumerate(row_options)
            if len(option) > 1
        ]
        if longer:
            owners = torch.tensor([row for row, _, _ in longer], device=self._device)
            rests = [option for _, _, option in longer]
            for (row, place, _), rest in zip(longer, self._continue(batch, plan.select(owners), owners, rests), strict=True):
                totals[row][place] += rest
        return [
            [
                OptionScore(option, total, len(tokens), len(option.encode()))
                for option, total, tokens in zip(request.options, row_totals, row_options, strict=True)
            ]
            for request, row_totals, row_options in zip(requests, totals, options, strict=True)
        ]

    def _continue(self, batch: _Batch, plan: Any, owners: torch.Tensor, options: Sequence[Sequence[int]]) -> Iterator[float]:
        """The log-likelihood of the options' tokens behind the first, on the cache of the prompts that they belong to."""
        batch.cache.batch_select_indices(owners)
        length = max(len(option) for option in options) - 1
        tokens = torch.zeros(len(options), length, dtype=torch.long)
        targets = torch.zeros_like(tokens)
        there = torch.zeros_like(tokens)
        for row, option in enumerate(options):
            tokens[row, : len(option) - 1] = torch.tensor(option[:-1])
            targets[row, : len(option) - 1] = torch.tensor(option[1:])
            there[row, : len(option) - 1] = 1
        tokens, targets, there = (table.to(self._device) for table in (tokens, targets, there))
        mask = torch.cat([batch.mask[owners], there], dim=1)
        positions = batch.positions[owners][:, None] + 1 + torch.arange(length, device=self._device)
        with self._composed.composed(plan):
            logits = self._forward(tokens, mask, positions, batch.cache).float()
        chosen = logits.gather(2, targets[:, :, None])[:, :, 0] - logits.logsumexp(dim=-1)
        yield from ((chosen * there).sum(dim=1)).tolist()


def _finished(row: _Row) -> Generation:
    assert row.finish_reason is not None
    return Generation(
        row.text,
        tuple(row.tokens),
        tuple(row.log_probabilities),
        row.finish_reason,
        row.prompt_tokens,
        row.seconds_to_first_token,
    )


def _check(request: GenerationRequest) -> None:
    allowed = {
        "max_tokens": (request.max_tokens >= 1, "at least 1"),
        "temperature": (0 <= request.temperature <= 100, "from 0 to 100"),
        "top_p": (0 < request.top_p <= 1, "above 0 and at most 1"),
        "stop": (all(request.stop), "texts that are not empty"),
    }
    for name, (fine, wanted) in allowed.items():
        if not fine:
            raise RequestError(f"{name} is {getattr(request, name)!r}", f"Allowed: {wanted}", field=name)
