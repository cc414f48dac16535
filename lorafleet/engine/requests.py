"""What is asked of the engine, and what it answers."""

from dataclasses import dataclass, field
from typing import Literal

from lorafleet.composition import BASE, Composition

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue.

    Attributes:
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_p: draws only from the smallest set of tokens with this mass.
        seed: makes the draws repeatable, whatever else is in the batch.
        stop: texts that end the answer; the answer does not hold them.
    """

    prompt: str
    composition: Composition = BASE
    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generation:
    """A continued prompt.

    Attributes:
        tokens: the new token ids, without the end token.
        log_probabilities: of each of them under the model, at temperature 1.
        prompt_tokens: how many tokens the prompt has (after a cut, if it was too long).
        seconds_to_first_token: from the start of the batch.
    """

    text: str
    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    seconds_to_first_token: float


@dataclass(frozen=True)
class ScoreRequest:
    """One prompt with the answers to choose from."""

    prompt: str
    options: tuple[str, ...]
    composition: Composition = BASE


@dataclass(frozen=True)
class OptionScore:
    """The log-likelihood of an option as the prompt's continuation, in nats.

    Attributes:
        total: the sum over its tokens.
        tokens: how many it has.
        bytes: its length in UTF-8.
    """

    option: str
    total: float
    tokens: int
    bytes: int = field(default=0)

    def by(self, scoring: str) -> float:
        """The score to compare: "sum", per "token", or per "byte"."""
        return self.total / {"sum": 1, "token": self.tokens, "byte": self.bytes}[scoring]
