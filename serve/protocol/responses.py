"""Response bodies: OpenAI's, with `composition` and `timings`, and LoRAFleet's own."""

from typing import Any, Literal

from pydantic import BaseModel

AdapterState = Literal["ready", "loading", "removing", "failed"]


class RoutedNeighbour(BaseModel):
    """A row of a corpus near the input; `similarity` is a cosine."""

    task: str
    text: str
    similarity: float


class AppliedComposition(BaseModel):
    """What was composed for an answer; no weights at all is the base model.

    `weigher` is the one that found the weights, `neighbours` what it found them from, where the request asks for them.
    """

    method: str
    weights: dict[str, float]
    density: float
    weigher: str | None = None
    neighbours: list[RoutedNeighbour] | None = None


class Timings(BaseModel):
    """Where the time went, in milliseconds; of several prompts the longest of each.

    `queue_ms` is the wait for a place in a batch, `first_token_ms` the time from the start of the batch to the first token.
    """

    retrieval_ms: float
    weighing_ms: float
    queue_ms: float
    first_token_ms: float
    total_ms: float


class Usage(BaseModel):
    """Tokens: a prompt counts once, whatever `n` is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """The tokens of a choice; `text_offset` is where each begins in its text, `top_logprobs` holds the chosen one too.

    The first token of an echoed prompt follows nothing: its log-probability and its alternatives are null.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    text_offset: list[int]
    top_logprobs: list[dict[str, float] | None] | None


class CompletionChoice(BaseModel):
    """One continuation; its own composition is said where the request has several prompts."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: CompletionLogprobs | None = None
    composition: AppliedComposition | None = None


class CompletionResponse(BaseModel):
    """The answer of /v1/completions; `composition` is that of the first choice."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    composition: AppliedComposition
    timings: Timings


class CompletionChunkChoice(BaseModel):
    """What a chunk adds to one continuation; `finish_reason` comes with its last, `composition` with its first."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: CompletionLogprobs | None
    composition: AppliedComposition | None = None


class CompletionChunk(BaseModel):
    """A piece of a streamed answer of /v1/completions; the first has `composition`, the last `timings`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None
    composition: AppliedComposition | None = None
    timings: Timings | None = None


class TopLogprob(BaseModel):
    """A token that might have been; `bytes` is its UTF-8, null for a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of a chat answer, with the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of a chat answer."""

    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    """The message of a chat answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChatLogprobs | None = None


class ChatCompletionResponse(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    composition: AppliedComposition
    timings: Timings


class Delta(BaseModel):
    """What a chunk adds to a message; `role` comes with the first."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """What a chunk adds to one answer; `finish_reason` comes with its last."""

    index: int
    delta: Delta
    finish_reason: Literal["stop", "length"] | None
    logprobs: ChatLogprobs | None


class ChatCompletionChunk(BaseModel):
    """A piece of a streamed answer of /v1/chat/completions; the first has `composition`, the last `timings`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    composition: AppliedComposition | None = None
    timings: Timings | None = None


class RouteTimings(BaseModel):
    """Where the time of a route went, in milliseconds."""

    retrieval_ms: float
    weighing_ms: float
    total_ms: float


class RouteResponse(BaseModel):
    """The answer of /v1/route: the weights (they sum to 1), and every task's share before the weigher's cut."""

    input: str
    weigher: str
    weights: dict[str, float]
    shares: dict[str, float]
    nucleus: list[str]
    neighbours: list[RoutedNeighbour]
    timings: RouteTimings


class ModelCard(BaseModel):
    """Something that `model` may name; `task` and `family` are an adapter's."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "lorafleet"
    task: str | None = None
    family: str | None = None


class ModelList(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """The answer of /healthz and /readyz."""

    status: Literal["ok"] = "ok"


class ErrorDetail(BaseModel):
    """What went wrong; `param` names the field of the request that is at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every error, as OpenAI has it."""

    error: ErrorDetail


class ListedAdapter(BaseModel):
    """An adapter of the pool: `modules` are the kinds of layers it changes, `card` how it was trained.

    One whose state is `failed` cannot be loaded, and `error` says why.
    """

    name: str
    object: Literal["adapter"] = "adapter"
    task: str
    family: str | None
    rank: int
    alpha: float
    modules: list[str]
    rows: int | None
    base: str
    created: int
    origin: Literal["trained", "added"]
    state: AdapterState
    error: str | None
    card: dict[str, Any] | None


class AdapterList(BaseModel):
    """The answer of GET /v1/adapters."""

    object: Literal["list"] = "list"
    data: list[ListedAdapter]


class AdapterRemoved(BaseModel):
    """The answer of DELETE /v1/adapters/{name}."""

    name: str
    object: Literal["adapter"] = "adapter"
    deleted: Literal[True] = True
