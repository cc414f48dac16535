"""What the deployments hand to each other."""

from collections.abc import Mapping
from dataclasses import dataclass

from lorafleet.composition import Composition
from lorafleet.engine import FinishReason
from lorafleet.retrieval import Vectors
from serve.choosing import Choice


@dataclass(frozen=True)
class NearRow:
    """A row of a corpus near a query, as the index has it: who reads it here need not load Chroma.

    Attributes:
        text: empty where nobody asked for it.
    """

    task: str
    text: str
    similarity: float


@dataclass(frozen=True)
class Found:
    """The neighbours of a query, nearest first, and how long the search took with its wait for a batch.

    Attributes:
        embedding: where the query lies, float32 [dimensions]; None where its weigher does not ask for it.
        places: which places of the tasks the retriever has beside it (`Places.index`).
    """

    neighbours: tuple[NearRow, ...]
    milliseconds: float
    embedding: Vectors | None = None
    places: str = ""


@dataclass(frozen=True)
class Weighed:
    """The task weights of a query.

    Attributes:
        shares: every task's, before the weigher's cut.
        weigher: by its name.
        neighbours: what the weights come from, where the request wants to see them.
        retrieval_ms, weighing_ms: how long it took.
    """

    weights: Mapping[str, float]
    shares: Mapping[str, float]
    weigher: str
    neighbours: tuple[NearRow, ...] | None
    retrieval_ms: float
    weighing_ms: float


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn; as in `GenerationRequest`, with `n` answers a prompt.

    Attributes:
        likeliest: how many alternatives to tell for every token; None where not even the tokens are wanted.
        echo: whether the prompt's text is wanted, and its tokens too where those of the answer are.
    """

    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    n: int
    likeliest: int | None = None
    echo: bool = False


@dataclass(frozen=True)
class Order:
    """One prompt to continue.

    Attributes:
        prompt: a text, token ids, or a conversation as (role, text) pairs for the chat template.
        choice: the composition that is wanted.
    """

    prompt: str | tuple[int, ...] | tuple[tuple[str, str], ...]
    choice: Choice
    sampling: Sampling


@dataclass(frozen=True)
class Token:
    """A token of an answer, or of an echoed prompt, as text.

    Attributes:
        start: where it begins in that text, in characters.
        log_probability: None for the first of a prompt, which follows nothing.
        likeliest: the likeliest tokens in its place with their log-probabilities.
    """

    text: str
    start: int
    log_probability: float | None
    likeliest: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Begun:
    """An order that the engine has taken: what is composed for it, and from which weights where retrieval found them.

    Attributes:
        echo: the prompt's text, where it is wanted.
    """

    composition: Composition
    weighed: Weighed | None
    echo: str = ""


@dataclass(frozen=True)
class Ended:
    """How an answer ended, how many tokens it and its prompt have, and how long it waited and began."""

    finish_reason: FinishReason
    prompt_tokens: int
    tokens: int
    queue_ms: float
    first_token_ms: float


@dataclass(frozen=True)
class News:
    """What is new of one of an order's answers.

    Attributes:
        choice: which of them.
        tokens: those whose text is certain by now, where they are wanted.
        ended: given with the last news.
    """

    choice: int
    text: str
    tokens: tuple[Token, ...] = ()
    ended: Ended | None = None


@dataclass(frozen=True)
class Load:
    """How many rows an engine computes, and how many requests wait for one."""

    running: int
    waiting: int


@dataclass(frozen=True)
class Continuation:
    """One whole answer to an order.

    Attributes:
        tokens: of an echoed prompt and of the answer, where they are wanted.
    """

    text: str
    tokens: tuple[Token, ...]
    ended: Ended


@dataclass(frozen=True)
class Completed:
    """The whole answers to an order."""

    begun: Begun
    continuations: tuple[Continuation, ...]
