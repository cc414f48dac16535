"""A request on its way through the engine."""

import random
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from lorafleet.composition import Lease, Recipe
from lorafleet.engine.requests import (
    FinishReason,
    Generation,
    GenerationRequest,
    OptionScore,
    Piece,
    ScoreRequest,
    TokenChoice,
    ToldPrompt,
)
from lorafleet.engine.sampling import Draw
from lorafleet.engine.segments import Segment
from lorafleet.engine.text import TextStream

OnPiece = Callable[[Piece], None]


@dataclass(eq=False)
class Sequence:
    """A generation: what was asked, what it holds, and what it has produced so far.

    Attributes:
        text: the answer's text as it comes; None where nobody needs it before the end.
        computed: how many tokens of the prompt are in the cache.
        told: of the prompt's tokens from the second on, where that is wanted.
    """

    request: GenerationRequest
    prompt: list[int]
    recipe: Recipe
    future: Future[Generation]
    on_piece: OnPiece | None
    text: TextStream | None
    asked_at: float = field(default_factory=time.perf_counter)
    begun_at: float = 0.0
    first_at: float = 0.0
    lease: Lease | None = None
    room: Any = None
    computed: int = 0
    told: list[TokenChoice] = field(default_factory=list)
    choices: list[TokenChoice] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        request = self.request
        seed = request.seed
        # Of a number, Random leaves out the sign.
        source = random.Random(str(seed) if seed is not None and seed < 0 else seed)
        self.draw = Draw(request.temperature, request.top_p, source)

    @property
    def reserved(self) -> int:
        """How many tokens it can come to have in the cache."""
        return len(self.prompt) + self.request.max_tokens

    @property
    def past(self) -> int:
        """How many of its tokens are in the cache, once the prompt is: all but the last."""
        return len(self.prompt) + len(self.choices) - 1

    def next_segment(self, limit: int) -> Segment[Any]:
        """The next piece of the prompt, at most `limit` tokens."""
        tokens = self.prompt[self.computed : self.computed + limit]
        ends = self.computed + len(tokens) == len(self.prompt)
        wanted = range(0 if self.request.tell_prompt else len(tokens) - ends, len(tokens))
        return Segment(tokens, self.computed, self.room, self.lease, wanted)

    def foretold(self, segment: Segment[Any]) -> list[int]:
        """The tokens of the prompt that a piece's logits foretell, where they are wanted."""
        return self.prompt[segment.past + 1 : segment.past + 1 + len(segment.tokens)] if self.request.tell_prompt else []

    def add(self, choice: TokenChoice, end_tokens: Collection[int]) -> None:
        """Take the next token."""
        if not self.first_at:
            self.first_at = time.perf_counter()
        if self.request.max_tokens == 0:
            self.finish_reason = "length"
            return
        if choice.token in end_tokens:
            self.finish_reason = "stop"
            return
        self.choices.append(choice)
        if self.text is not None:
            start = len(self.text.text)
            news = self.text.add(choice.token)
            if self.text.stopped:
                self.finish_reason = "stop"
            self._tell(Piece(news, choice, start))
        if self.finish_reason is None and len(self.choices) >= self.request.max_tokens:
            self.finish_reason = "length"

    def finished(self, decode: Callable[[list[int]], str]) -> Generation:
        """The answer; the last of its text goes out first."""
        assert self.finish_reason is not None
        if self.text is None:
            text = decode([choice.token for choice in self.choices])
        else:
            rest = self.text.end()
            if rest:
                self._tell(Piece(rest))
            text = self.text.text
        return Generation(
            text,
            tuple(self.choices),
            self.finish_reason,
            len(self.prompt),
            self.begun_at - self.asked_at,
            self.first_at - self.begun_at,
            ToldPrompt(self.prompt[0], tuple(self.told)) if self.request.tell_prompt else None,
        )

    def _tell(self, piece: Piece) -> None:
        if self.on_piece is not None:
            try:
                self.on_piece(piece)
            except Exception:
                # Whoever listens has gone, and nobody else's rows may suffer for it.
                self.future.cancel()


@dataclass(eq=False)
class Scoring:
    """A prompt with options, computed in one pass: the prompt once, and behind it every option but for its last token."""

    request: ScoreRequest
    prompt: list[int]
    options: list[list[int]]
    recipe: Recipe
    future: Future[list[OptionScore]]
    lease: Lease | None = None
    room: Any = None

    @property
    def tokens(self) -> list[int]:
        """Everything that the pass computes."""
        return [*self.prompt, *(token for option in self.options for token in option[:-1])]

    def segment(self) -> Segment[Any]:
        """The whole of it; wanted are the logits behind the prompt and behind every token of the options."""
        tokens = self.tokens
        options = tuple(len(option) - 1 for option in self.options)
        return Segment(tokens, 0, self.room, self.lease, range(len(self.prompt) - 1, len(tokens)), options)

    def targets(self) -> tuple[list[int], list[int], list[int]]:
        """For every token of the options: its option, the place of the logits that foretell it, and its id."""
        owners, places, ids = [], [], []
        start = 1
        for number, option in enumerate(self.options):
            owners += [number] * len(option)
            places += [0, *range(start, start + len(option) - 1)]
            ids += option
            start += len(option) - 1
        return owners, places, ids

    def scores(self, totals: list[float]) -> list[OptionScore]:
        """The answer, from each option's summed log-probabilities."""
        return [
            OptionScore(option, total, len(tokens), len(option.encode()))
            for option, total, tokens in zip(self.request.options, totals, self.options, strict=True)
        ]
