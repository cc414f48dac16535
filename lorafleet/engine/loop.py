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
    """Takes turns: a pass over one more token of every row, and a pass over prompts and scores that wait.

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
        self._left = prefill_tokens

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
        rows, pieces, scorings = list(self._decoding), self._next_pieces(), self._held_scorings()
        # Both passes are under way before the first one's answer is waited for: a GPU computes the one while the other,
        # which is many launches, is prepared.
        decoded = _attempt(lambda: self._decode(rows)) if rows else None
        prefilled = _attempt(lambda: self._prefill(pieces, scorings)) if pieces or scorings else None
        if decoded is not None:
            self._finish_decode(rows, decoded)
        if prefilled is not None:
            self._finish_prefill([sequence for sequence, _ in pieces], scorings, prefilled)

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

    def _next_pieces(self) -> list[tuple[Sequence, Segment[Any]]]:
        """The prompts that the next pass works at, with the piece of each."""
        pieces = []
        left = self._prefill_tokens
        for sequence in self._prefilling:
            if left <= 0:
                break
            segment = sequence.next_segment(left)
            pieces.append((sequence, segment))
            left -= len(segment.tokens)
        self._left = left
        return pieces

    def _held_scorings(self) -> list[Scoring]:
        """The scores that fit into the pass beside the prompts; the first in any case, where it has the pass for itself."""
        held: list[Scoring] = []
        alone = self._left == self._prefill_tokens
        while self._scoring:
            scoring = self._scoring[0]
            if not scoring.future.cancelled():
                tokens = len(scoring.tokens)
                if tokens > self._left and not (alone and not held):
                    break
                try:
                    if not self._hold(scoring, tokens):
                        break
                    held.append(scoring)
                    self._left -= tokens
                except Exception as error:
                    _settle(scoring.future, error)
            self._scoring.popleft()
        return held

    def _decode(self, rows: list[Sequence]) -> torch.Tensor:
        return self._runner.decode(
            [sequence.choices[-1].token for sequence in rows],
            [sequence.past for sequence in rows],
            [sequence.room for sequence in rows],
            [sequence.lease for sequence in rows],
        )

    def _prefill(self, pieces: list[tuple[Sequence, Segment[Any]]], scorings: list[Scoring]) -> torch.Tensor:
        logits = self._runner.prefill([*(segment for _, segment in pieces), *(scoring.segment() for scoring in scorings)])
        for sequence, segment in pieces:
            sequence.computed += len(segment.tokens)
        return logits

    def _finish_decode(self, rows: list[Sequence], logits: torch.Tensor | Exception) -> None:
        self._choose_or_fail(rows, logits)
        self._decoding = _going_on(rows)
        self._answer(rows)

    def _finish_prefill(self, sequences: list[Sequence], scorings: list[Scoring], logits: torch.Tensor | Exception) -> None:
        if isinstance(logits, Exception):
            self._fail([*sequences, *scorings], logits)
            gone = sequences
        else:
            gone = [sequence for sequence in sequences if sequence.computed == len(sequence.prompt)]
            self._choose_or_fail(gone, logits[: len(gone)])
            try:
                self._score(scorings, logits[len(gone) :])
            except Exception as error:
                self._fail(scorings, error)
        self._prefilling = [sequence for sequence in self._prefilling if sequence not in gone]
        self._decoding += _going_on(gone)
        self._answer(gone)

    def _choose_or_fail(self, rows: list[Sequence], logits: torch.Tensor | Exception) -> None:
        if isinstance(logits, Exception):
            self._fail(rows, logits)
            return
        try:
            self._choose(rows, logits)
        except Exception as error:
            # What a GPU cannot compute it says when the answer is read.
            self._fail(rows, error)

    def _choose(self, rows: list[Sequence], logits: torch.Tensor) -> None:
        if not rows:
            return
        likeliest = max(sequence.request.likeliest for sequence in rows)
        chosen = choose(logits, [sequence.draw for sequence in rows], likeliest)
        for place, sequence in enumerate(rows):
            tops = tuple(chosen.likeliest[place][: sequence.request.likeliest])
            sequence.add(TokenChoice(chosen.tokens[place], chosen.log_probabilities[place], tops), self._end_token)

    def _answer(self, rows: list[Sequence]) -> None:
        """Answer the rows that are done, once they hold nothing any more."""
        for sequence in rows:
            if sequence.finish_reason is not None:
                self._let_go(sequence)
                _settle(sequence.future, sequence.finished(self._decode_text))

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


def _going_on(rows: list[Sequence]) -> list[Sequence]:
    """The rows that are neither done nor failed."""
    return [sequence for sequence in rows if sequence.finish_reason is None and sequence.room is not None]


def _attempt(run: Callable[[], torch.Tensor]) -> torch.Tensor | Exception:
    """What a pass gives, or why it does not."""
    try:
        return run()
    except Exception as error:
        return error


def _settle(future: "Future[Any]", answer: object) -> None:
    """Answer a future, unless nobody waits for it any more."""
    try:
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
    except InvalidStateError:
        pass
