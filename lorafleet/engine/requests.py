"""What is asked of the engine, and what it answers."""

from dataclasses import dataclass, field
from typing import Literal

from lorafleet.composition import BASE, Composition
from lorafleet.errors import LoRAFleetError, RequestError

FinishReason = Literal["stop", "length", "error"]
MOST_LIKELIEST = 20
MOST_STOP_CHARACTERS = 1000
"""Of one stop text."""


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue.

    Attributes:
        prompt: a text, or token ids, which are taken as they are.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_p: draws only from the smallest set of tokens with this mass.
        seed: makes the draws repeatable, whatever else is in the batch.
        stop: texts of up to 1,000 characters that end the answer; the answer does not hold them. One may name special
            tokens.
        likeliest: how many of the likeliest tokens the answer tells at every place, at most 20.
        tell_prompt: whether the answer tells of the prompt's tokens what it tells of its own; `max_tokens` may be 0 then.
    """

    prompt: str | tuple[int, ...]
    composition: Composition = BASE
    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    likeliest: int = 0
    tell_prompt: bool = False

    def check(self) -> None:
        """Refuse bounds that are out of range.

        Raises:
            RequestError: one is.
        """
        allowed = {
            "max_tokens": (self.max_tokens >= (0 if self.tell_prompt else 1), "at least 1"),
            "temperature": (0 <= self.temperature <= 100, "from 0 to 100"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "stop": (all(self.stop), "texts that are not empty"),
            "likeliest": (0 <= self.likeliest <= MOST_LIKELIEST, f"from 0 to {MOST_LIKELIEST}"),
        }
        for place, stop in enumerate(self.stop):
            if len(stop) > MOST_STOP_CHARACTERS:
                most = f"Allowed: at most {MOST_STOP_CHARACTERS}"
                raise RequestError(f"stop.{place} has {len(stop)} characters", most, field=f"stop.{place}")
        for name, (fine, wanted) in allowed.items():
            if not fine:
                raise RequestError(f"{name} is {getattr(self, name)!r}", f"Allowed: {wanted}", field=name)


@dataclass(frozen=True)
class TokenChoice:
    """A token of an answer.

    Attributes:
        log_probability: under the model, at temperature 1.
        likeliest: the likeliest tokens in its place with their log-probabilities, as many as were asked for.
    """

    token: int
    log_probability: float
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What a step adds to an answer; the pieces' texts, one behind the other, are the answer's text.

    A piece may have a token and no text yet (half of a character, or what may become a stop text), and the last one text
    and no token.

    Attributes:
        start: where the token's own text begins in the answer, in characters.
    """

    text: str
    choice: TokenChoice | None = None
    start: int = 0


@dataclass(frozen=True)
class ToldPrompt:
    """A prompt's tokens as if each had been chosen, but for the first, which follows nothing."""

    first: int
    choices: tuple[TokenChoice, ...]


@dataclass(frozen=True)
class Generation:
    """A continued prompt.

    Attributes:
        choices: the new tokens, without the end token.
        prompt_tokens: how many tokens the prompt has (after a cut, if it was too long).
        seconds_waiting: from the request to the first computation for it.
        seconds_to_first_token: from there to the first token.
        prompt: what was asked to be told of it.
        error: why a row of a batch could not be computed: its adapters overflow. It has no text then.
    """

    text: str
    choices: tuple[TokenChoice, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    seconds_waiting: float
    seconds_to_first_token: float
    prompt: ToldPrompt | None = None
    error: LoRAFleetError | None = None

    def checked(self) -> "Generation":
        """The same.

        Raises:
            CompositionError, ModelError: it could not be computed.
        """
        if self.error is not None:
            raise self.error
        return self

    @property
    def tokens(self) -> tuple[int, ...]:
        """The new token ids."""
        return tuple(choice.token for choice in self.choices)

    @property
    def log_probabilities(self) -> tuple[float, ...]:
        """Of each new token under the model, at temperature 1."""
        return tuple(choice.log_probability for choice in self.choices)


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
