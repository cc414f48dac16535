"""Continuous batching: who computes next. Requests join and leave between passes."""

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, TypeVar

import torch

from lorafleet.composition import AdapterPool, Recipe
from lorafleet.engine.cache import KeyValueCache
from lorafleet.engine.requests import TokenChoice
from lorafleet.engine.runner import Runner
from lorafleet.engine.sampling import Choosing, Chosen, choose, tell
from lorafleet.engine.segments import PASS_PROMPTS, Segment
from lorafleet.engine.sequence import Scoring, Sequence
from lorafleet.errors import CompositionError, LoRAFleetError, ModelError

Under = TypeVar("Under")


class Loop:
    """Takes turns: a pass over one more token of every row, and a pass over prompts and scores that wait.

    A prompt longer than `prefill_tokens` is computed in pieces, so that the rows never wait longer than for one piece. A
    request whose adapters are being prepared waits aside, and others go first. One thread calls `step`; `take` may be
    called from others.

    Args:
        rows: sequences at once.
        prefill_tokens: tokens of a pass over prompts.
        wake: is called, from any thread, when adapters are prepared.
    """

    def __init__(
        self,
        runner: Runner,
        pool: AdapterPool,
        cache: KeyValueCache[Any],
        decode: Callable[[list[int]], str],
        end_tokens: Collection[int],
        rows: int,
        prefill_tokens: int,
        wake: Callable[[], None],
    ) -> None:
        self._runner, self._pool, self._cache, self._wake = runner, pool, cache, wake
        self._decode_text, self._end_tokens = decode, end_tokens
        self._rows, self._prefill_tokens = rows, prefill_tokens
        self._waiting: deque[Sequence] = deque()
        self._scoring: deque[Scoring] = deque()
        self._preparing: list[Sequence | Scoring] = []
        self._prefilling: list[Sequence] = []
        self._decoding: list[Sequence] = []
        self._left = prefill_tokens

    @property
    def waiting(self) -> int:
        """How many requests have not begun."""
        queued: list[Sequence | Scoring] = [*list(self._waiting), *list(self._scoring), *list(self._preparing)]
        return sum(not one.future.cancelled() for one in queued)

    @property
    def running(self) -> int:
        """How many rows are on their way."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._scoring or self._preparing or self._prefilling or self._decoding)

    def take(self, item: Sequence | Scoring) -> None:
        """Queue a request."""
        if isinstance(item, Sequence):
            self._waiting.append(item)
        else:
            self._scoring.append(item)

    def step(self) -> bool:
        """Let go of what was cancelled, begin what there is room for, and compute one round.

        Returns:
            Whether there was anything to compute. If not, every request waits for adapters that are being prepared.
        """
        self._drop_cancelled()
        self._queue_prepared()
        self._begin()
        rows, pieces, scorings = list(self._decoding), self._next_pieces(), self._held_scorings()
        # All is under way before anything is waited for: a GPU computes the step while the pass over prompts, which is many
        # launches, is prepared, and that pass while the step's answers are dealt out.
        decoding = _attempt(lambda: self._choose(rows, self._decode(rows))) if rows else None
        prefilling = _attempt(lambda: self._prefill(pieces, scorings)) if pieces or scorings else None
        if decoding is not None:
            self._finish_decode(rows, decoding)
        if prefilling is not None:
            self._finish_prefill([sequence for sequence, _ in pieces], scorings, prefilling)
        return decoding is not None or prefilling is not None

    def abandon(self, error: Exception) -> None:
        """Fail everything that waits or is on its way."""
        self._fail([*self._prefilling, *self._decoding, *self._waiting, *self._scoring, *self._preparing], error)
        self._preparing.clear()
        self._prefilling.clear()
        self._decoding.clear()
        self._waiting.clear()
        self._scoring.clear()

    def _drop_cancelled(self) -> None:
        """Let go of cancelled requests, wherever they are: queues would fill up with them while all rows are busy."""
        queues: tuple[Any, ...] = (self._prefilling, self._decoding, self._preparing, self._waiting, self._scoring)
        for queue in queues:
            # A copy: requests are queued from other threads.
            for item in [one for one in list(queue) if one.future.cancelled()]:
                queue.remove(item)
                self._let_go(item)

    def _queue_prepared(self) -> None:
        """Put requests back at the head of their queue once their adapters are prepared."""
        for item in [one for one in reversed(self._preparing) if _ready(one)]:
            self._preparing.remove(item)
            if isinstance(item, Sequence):
                self._waiting.appendleft(item)
            else:
                self._scoring.appendleft(item)

    def _begin(self) -> None:
        passed_over: list[Sequence] = []
        while self._waiting and self.running < self._rows:
            sequence = self._waiting.popleft()
            recipe = sequence.recipe
            if not sequence.lease and recipe.prepared and (passed_over or self._pool.prepares_too_much(recipe)):
                # It waits for rows with prepared adapters alone, so rows without go first.
                passed_over.append(sequence)
            else:
                held = self._hold(sequence, sequence.reserved)
                if held is _Held.NO_ROOM:
                    self._waiting.appendleft(sequence)
                    break
                if held is _Held.YES:
                    sequence.begun_at = time.perf_counter()
                    self._prefilling.append(sequence)
        self._waiting.extendleft(reversed(passed_over))

    def _hold(self, item: Sequence | Scoring, tokens: int) -> "_Held":
        """Get the adapters and then the room that an item needs; it goes aside while adapters are prepared."""
        try:
            item.lease = item.lease or self._pool.lease(item.recipe, wait=False)
            if item.lease is None:
                return _Held.NO_ROOM
            if not item.lease.ready:
                self._preparing.append(item)
                for preparation in item.lease.waits_for:
                    preparation.add_done_callback(lambda _: self._wake())
                return _Held.ASIDE
            item.lease.check()
            item.room = self._cache.reserve(tokens, passing=isinstance(item, Scoring))
        except Exception as error:
            self._fail([item], error)
            return _Held.FAILED
        if item.room is not None:
            return _Held.YES
        if not item.recipe.prepared:
            # Prepared adapters are kept: it comes next, and they would be prepared once more.
            self._let_go(item)
        return _Held.NO_ROOM

    def _let_go(self, item: Sequence | Scoring) -> None:
        if item.lease is not None:
            self._pool.release(item.lease)
        if item.room is not None:
            self._cache.release(item.room)
        item.lease = item.room = None

    def _next_pieces(self) -> list[tuple[Sequence, Segment[Any]]]:
        """The prompts that the next pass works at, with the piece of each."""
        pieces: list[tuple[Sequence, Segment[Any]]] = []
        left = self._prefill_tokens
        for sequence in self._prefilling:
            if left <= 0 or len(pieces) == PASS_PROMPTS:
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
            scoring = self._scoring.popleft()
            tokens = len(scoring.tokens)
            fits = tokens <= self._left or (alone and not held)
            outcome = self._hold(scoring, tokens) if fits else _Held.NO_ROOM
            if outcome is _Held.NO_ROOM:
                self._scoring.appendleft(scoring)
                break
            if outcome is _Held.YES:
                held.append(scoring)
                self._left -= tokens
        return held

    def _decode(self, rows: list[Sequence]) -> torch.Tensor:
        return self._runner.decode(
            [sequence.choices[-1].token for sequence in rows],
            [sequence.past for sequence in rows],
            [sequence.room for sequence in rows],
            [sequence.lease for sequence in rows],
        )

    def _prefill(self, pieces: list[tuple[Sequence, Segment[Any]]], scorings: list[Scoring]) -> "_Prefilling":
        logits = self._runner.prefill([*(segment for _, segment in pieces), *(scoring.segment() for scoring in scorings)])
        begun, last, telling, start = [], [], [], 0
        for sequence, segment in pieces:
            sequence.computed += len(segment.tokens)
            tokens = sequence.foretold(segment)
            if tokens:
                there = logits[start : start + len(tokens)]
                ids = torch.tensor(tokens, device=logits.device)
                telling.append((sequence, tell(there, ids, sequence.request.likeliest)))
            start += len(segment.wanted)
            if sequence.computed == len(sequence.prompt):
                begun.append(sequence)
                last.append(start - 1)
        choosing = self._choose(begun, logits[last] if telling else logits[: len(begun)]) if begun else None
        return _Prefilling(begun, choosing, telling, logits[start:])

    def _finish_decode(self, rows: list[Sequence], choosing: Choosing | Exception) -> None:
        self._add_or_fail(rows, choosing)
        self._decoding = _going_on(rows)
        self._answer(rows)

    def _finish_prefill(
        self, sequences: list[Sequence], scorings: list[Scoring], prefilling: "_Prefilling | Exception"
    ) -> None:
        if isinstance(prefilling, Exception):
            self._fail([*sequences, *scorings], prefilling)
            gone = sequences
        else:
            gone = prefilling.begun
            for sequence, telling in prefilling.telling:
                self._tell_or_fail(sequence, telling)
            if prefilling.choosing is not None:
                self._add_or_fail(gone, prefilling.choosing)
            try:
                self._score(scorings, prefilling.logits)
            except Exception as error:
                self._fail(scorings, error)
        self._prefilling = [one for one in self._prefilling if one not in gone and one.room is not None]
        self._decoding += _going_on(gone)
        self._answer(gone)

    def _choose(self, rows: list[Sequence], logits: torch.Tensor) -> Choosing:
        likeliest = max(sequence.request.likeliest for sequence in rows)
        return choose(logits, [sequence.draw for sequence in rows], likeliest)

    def _add_or_fail(self, rows: list[Sequence], choosing: Choosing | Exception) -> None:
        if isinstance(choosing, Exception):
            self._fail(rows, choosing)
            return
        try:
            self._add(rows, choosing.read())
        except Exception as error:
            # What a GPU cannot compute it says when the answer is read.
            self._fail(rows, error)

    def _add(self, rows: list[Sequence], chosen: Chosen) -> None:
        for place, sequence in enumerate(rows):
            choice = _choice(chosen, place, sequence)
            if math.isfinite(choice.log_probability):
                sequence.add(choice, self._end_tokens)
            else:
                self._fail([sequence], self._overflow(sequence.recipe))

    def _tell_or_fail(self, sequence: Sequence, telling: Choosing) -> None:
        try:
            told = telling.read()
            if not all(map(math.isfinite, told.log_probabilities)):
                raise self._overflow(sequence.recipe)
            sequence.told += [_choice(told, place, sequence) for place in range(len(told.tokens))]
        except Exception as error:
            self._fail([sequence], error)

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
            totals = found.new_zeros(len(scoring.options)).index_add(0, owners, found).tolist()
            self._let_go(scoring)
            finite = all(map(math.isfinite, totals))
            _settle(scoring.future, scoring.scores(totals) if finite else self._overflow(scoring.recipe))

    def _overflow(self, recipe: Recipe) -> LoRAFleetError:
        """The error for a row without finite logits: its own adapters, or the base model, overflow in the engine's dtype."""
        dtype = str(self._pool.pages.dtype).removeprefix("torch.")
        if recipe.composition.is_base:
            return ModelError(f"the base model overflows in {dtype}", "Compute in bfloat16 or float32 (models.dtype)")
        names = ", ".join(recipe.composition.weights)
        return CompositionError(
            f"weights of {names} overflow in {dtype}",
            "Give smaller weights, or compute in bfloat16 or float32 (models.dtype)",
        )

    def _fail(self, items: Iterable[Sequence | Scoring], error: Exception) -> None:
        for item in items:
            self._let_go(item)
            _settle(item.future, error)


class _Held(Enum):
    """The outcome of an item's request for adapters and room."""

    YES = auto()
    ASIDE = auto()
    FAILED = auto()
    NO_ROOM = auto()


@dataclass(frozen=True)
class _Prefilling:
    """A pass over prompts that is under way.

    Attributes:
        begun: the sequences whose prompt ends with it; `choosing` is of their first tokens.
        telling: of the tokens of those prompts that are to be told of.
        logits: those that the scores want.
    """

    begun: list[Sequence]
    choosing: Choosing | None
    telling: list[tuple[Sequence, Choosing]]
    logits: torch.Tensor


def _choice(chosen: Chosen, place: int, sequence: Sequence) -> TokenChoice:
    """A row's token, with as many of the likeliest as it wants."""
    tops = tuple(chosen.likeliest[place][: sequence.request.likeliest])
    return TokenChoice(chosen.tokens[place], chosen.log_probabilities[place], tops)


def _ready(item: Sequence | Scoring) -> bool:
    return item.lease is not None and item.lease.ready


def _going_on(rows: list[Sequence]) -> list[Sequence]:
    """The rows that are neither done nor failed."""
    return [sequence for sequence in rows if sequence.finish_reason is None and sequence.room is not None]


def _attempt(run: Callable[[], Under]) -> Under | Exception:
    """What a pass has under way, or why it has not."""
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
