"""What the deployments hand to each other."""

from collections.abc import Mapping
from dataclasses import dataclass

from lorafleet.composition import Composition
from lorafleet.engine import Generation
from serve.choosing import Choice


@dataclass(frozen=True)
class NearRow:
    """A row of a corpus near a query, as the index has it: who reads it here need not load Chroma."""

    task: str
    text: str
    similarity: float


@dataclass(frozen=True)
class Found:
    """The neighbours of a query, nearest first, and how long the search took with its wait for a batch."""

    neighbours: tuple[NearRow, ...]
    milliseconds: float


@dataclass(frozen=True)
class Weighed:
    """The task weights of a query, every task's share before the cut, and how long retrieval and weighing took."""

    weights: Mapping[str, float]
    shares: Mapping[str, float]
    retrieval_ms: float = 0.0
    weighing_ms: float = 0.0


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn; as in `GenerationRequest`, with `n` answers a prompt."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    n: int


@dataclass(frozen=True)
class Order:
    """One prompt to continue.

    Attributes:
        prompt: a text, or a conversation as (role, text) pairs for the chat template.
        choice: the composition that is wanted.
    """

    prompt: str | tuple[tuple[str, str], ...]
    choice: Choice
    sampling: Sampling


@dataclass(frozen=True)
class Token:
    """A generated token: its text, and its log-probability."""

    text: str
    log_probability: float


@dataclass(frozen=True)
class Continuation:
    """One answer to an order; `tokens` are those whose text is in it."""

    generation: Generation
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Completed:
    """The answers to an order, with the composition that was applied and where the time went."""

    continuations: tuple[Continuation, ...]
    composition: Composition
    retrieval_ms: float
    weighing_ms: float
    queue_ms: float
    first_token_ms: float
