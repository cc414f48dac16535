"""Continuous batching: who computes next. Requests join and leave between passes."""

import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from typing import Any

import torch

from lorafleet.composition import AdapterPool
from lorafleet.engine.cache import KeyValueCache
from lorafleet.engine.requests import TokenChoice
from lorafleet.engine.runner import Runner
from lorafleet.engine.sampling import choose
from lorafleet.engine.segments import Segment
from lorafleet.engine.sequence import Scoring, Sequence


class Loop:
    """Takes turns: a pass over prompts and scores that wait, then a pass over one more token of every row.

    A prompt longer than `prefill_tokens` is computed in pieces, so that the rows never wait longer than for one piece. One
    thread calls `step`; `take` may be called from others.

    Args:
        rows: sequences at once.
        prefill_tokens: tokens of a pass over prompts.
    """

    def __init__(
        self,
        runner: Runner,
        pool: AdapterPool,
        cache: KeyValueCache[Any],
        decode: Callable[[list[int]], str],
        end_token: int,
        rows: int,
        prefill_tokens: int,
    ) -> None:
        self._runner, self._pool, self._cache = runner, pool, cache
        self._decode_text, self._end_token = decode, end_token
        self._rows, self._prefill_tokens = rows, prefill_tokens
        self._waiting: deque[Sequence] = deque()
        self._scoring: deque[Scoring] = deque()
        self._prefilling: list[Sequence] = []
        self._decoding: list[Sequence] = []

    @property
    def waiting(self) -> int:
        """How many requests have not begun."""
        generations, scorings = list(self._waiting), list(self._scoring)
        return sum(not one.future.cancelled() for one in generations) + sum(not one.future.cancelled() for one in scorings)

    @property
    def running(self) -> int:
        """How many rows are on their way."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._scoring or self._prefilling or self._decoding)

    def take(self, item: Sequence | Scoring) -> None:
        """Queue a request."""
        if isinstance(item, Sequence):
            self._waiting.append(item)
        else:
            self._scoring.append(item)

    def step(self) -> None:
        """Let go of what was cancelled, begin what there is room for, and compute one round."""
        for rows in (self._prefilling, self._decoding):
            for sequence in [sequence for sequence in rows if sequence.future.cancelled()]:
                rows.remove(sequence)
                self._let_go(sequence)
        self._begin()
        if self._prefilling or self._scoring:
            self._prefill()
        if self._decoding:
            self._decode()

    def abandon(self, error: Exception) -> None:
        """Fail everything that waits or is on its way."""
        self._fail([*self._prefilling, *self._decoding, *self._waiting, *self._scoring], error)
        self._prefilling.clear()
        self._decoding.clear()
        self._waiting.clear()
        self._scoring.clear()

    def _begin(self) -> None:
        while self._waiting and self.running < self._rows:
            sequence = self._waiting[0]
            if not sequence.future.cancelled():
                try:
                    if not self._hold(sequence, sequence.reserved):
                        return
                except Exception as error:
                    _settle(sequence.future, error)
                else:
                    sequence.begun_at = time.perf_counter()
                    self._prefilling.append(sequence)
            self._waiting.popleft()

    def _hold(self, item: Sequence | Scoring, tokens: int) -> bool:
        """Get the adapters and the room that an item needs, both or none."""
        item.lease = self._pool.lease(item.recipe)
        if item.lease is None:
            return False
        item.room = self._cache.reserve(tokens, passing=isinstance(item, Scoring))
        if item.room is None:
            self._let_go(item)
            return False
        return True

    def _let_go(self, item: Sequence | Scoring) -> None:
        if item.lease is not None:
            self._pool.release(item.lease)
        if item.room is not None:
            self._cache.release(item.room)
        item.lease = item.room = None

    def _prefill(self) -> None:
        segments: list[Segment[Any]] = []
        left = self._prefill_tokens
        pieces: list[tuple[Sequence, int]] = []
        for sequence in self._prefilling:
            if left <= 0:
                break
            segment = sequence.next_segment(left)
            segments.append(segment)
            pieces.append((sequence, len(segment.tokens)))
            left -= len(segment.tokens)
        scorings = self._held_scorings(left, alone=not segments)
        segments += [scoring.segment() for scoring in scorings]
        if not segments:
            return
        try:
            logits = self._runner.prefill(segments)
            done = []
            for sequence, tokens in pieces:
                sequence.computed += tokens
                if sequence.computed == len(sequence.prompt):
                    done.append(sequence)
            self._choose(done, logits[: len(done)])
            self._score(scorings, logits[len(done) :])
        except Exception as error:
            self._fail([*(sequence for sequence, _ in pieces), *scorings], error)
            done = [sequence for sequence, _ in pieces]
        self._prefilling = [sequence for sequence in self._prefilling if sequence not in done]
        self._decoding += self._still_going(done)

    def _held_scorings(self, left: int, alone: bool) -> list[Scoring]:
        """The scores that fit into a pass; the first in any case, where nothing else is in it."""
        held: list[Scoring] = []
        while self._scoring:
            scoring = self._scoring[0]
            if not scoring.future.cancelled():
                tokens = len(scoring.tokens)
                if tokens > left and not (alone and not held):
                    break
                try:
                    if not self._hold(scoring, tokens):
                        break
                    held.append(scoring)
                    left -= tokens
                except Exception as error:
                    _settle(scoring.future, error)
            self._scoring.popleft()
        return held

    def _decode(self) -> None:
        rows = self._decoding
        try:
            logits = self._runner.decode(
                [sequence.choices[-1].token for sequence in rows],
                [sequence.past for sequence in rows],
                [sequence.room for sequence in rows],
                [sequence.lease for sequence in rows],
            )
            self._choose(rows, logits)
        except Exception as error:
            self._fail(rows, error)
        self._decoding = self._still_going(rows)

    def _choose(self, rows: list[Sequence], logits: torch.Tensor) -> None:
        if not rows:
            return
        likeliest = max(sequence.request.likeliest for sequence in rows)
        chosen = choose(logits, [sequence.draw for sequence in rows], likeliest)
        for place, sequence in enumerate(rows):
            tops = tuple(chosen.likeliest[place][: sequence.request.likeliest])
            sequence.add(TokenChoice(chosen.tokens[place], chosen.log_probabilities[place], tops), self._end_token)

    def _still_going(self, rows: list[Sequence]) -> list[Sequence]:
        """Answer the rows that are done, free what they hold, and give the others."""
        going = []
        for sequence in rows:
            if sequence.finish_reason is not None:
                self._let_go(sequence)
                _settle(sequence.future, sequence.finished(self._decode_text))
            elif sequence.room is not None:
                going.append(sequence)
        return going

    def _score(self, scorings: list[Scoring], logits: torch.Tensor) -> None:
        start = 0
        for scoring in scorings:
            owners, places, ids = (torch.tensor(values, device=logits.device) for values in scoring.targets())
            there = logits[start : start + len(scoring.tokens) - len(scoring.prompt) + 1]
            start += len(there)
            found = there[places, ids] - there.logsumexp(dim=-1)[places]
            totals = found.new_zeros(len(scoring.options)).index_add(0, owners, found)
            self._let_go(scoring)
            _settle(scoring.future, scoring.scores(totals.tolist()))

    def _fail(self, items: Iterable[Sequence | Scoring], error: Exception) -> None:
        for item in items:
            self._let_go(item)
            _settle(item.future, error)


def _settle(future: "Future[Any]", answer: object) -> None:
    """Answer a future, unless nobody waits for it any more."""
    try:
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
    except InvalidStateError:
        pass
