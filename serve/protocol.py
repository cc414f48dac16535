"""The wire format: OpenAI's completions, chat completions and models, and what LoRAFleet adds to them.

Added to requests is `composition`, to answers `composition` and `timings`. A field of OpenAI's that is not supported here is
tolerated where its value asks for nothing; every other unknown field is refused by name.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lorafleet.composition import METHODS
from lorafleet.errors import closest
from serve.errors import ApiError

MAX_PROMPTS = 64
MAX_CHOICES = 16
MAX_STOPS = 4
ANYTHING: tuple[Any, ...] = ()
# OpenAI's fields that nothing here reads, with the values that change nothing; ANYTHING where no value can.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "metadata": ANYTHING,
    "modalities": (None, ["text"]),
    "parallel_tool_calls": ANYTHING,
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "prompt_cache_key": ANYTHING,
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "safety_identifier": ANYTHING,
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "stream_options": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "user": ANYTHING,
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}

Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class CompositionRequest(BaseModel):
    """Which composition a request wants: `weights` outright, or by retrieval with the nucleus `p` of `top_k` neighbours."""

    model_config = ConfigDict(extra="forbid")

    method: str | None = None
    weights: dict[str, Annotated[float, Field(allow_inf_nan=False)]] | None = None
    density: Share | None = None
    weigher: Literal["nucleus"] | None = None
    p: Share | None = None
    top_k: Annotated[int, Field(ge=1, le=1000)] | None = None

    @field_validator("method")
    @classmethod
    def _known(cls, method: str | None) -> str | None:
        if method is not None and method not in METHODS:
            raise ValueError(closest(method, METHODS))
        return method

    @property
    def by_retrieval(self) -> tuple[str, ...]:
        """The fields in it that only retrieval reads."""
        return tuple(name for name in ("weigher", "p", "top_k") if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _one_way(self) -> "CompositionRequest":
        if self.weights is not None and self.by_retrieval:
            field = f"composition.{self.by_retrieval[0]}"
            raise ApiError.bad_request(
                f"{field} and composition.weights are both given. Leave one out: they are given, or found",
                field,
            )
        return self


class _Request(BaseModel):
    """What both kinds of completion share."""

    model_config = ConfigDict(extra="allow")

    model: Text = "auto"
    composition: CompositionRequest | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Share | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None

    @model_validator(mode="after")
    def _supported(self) -> "_Request":
        if self.stream:
            raise ApiError.bad_request("stream is true, and streaming is not there yet. Send stream: false", "stream")
        for name, value in (self.model_extra or {}).items():
            neutral = NEUTRAL.get(name)
            if neutral is None:
                known = [*type(self).model_fields, *NEUTRAL]
                raise ApiError.bad_request(f"unknown field {name}. {closest(name, known)}", name)
            if neutral is not ANYTHING and value not in neutral:
                raise ApiError.bad_request(f"{name} is {shown(value)}, which is not supported. Leave it out", name)
        stops = self.stops
        if len(stops) > MAX_STOPS or not all(stops):
            raise ApiError.bad_request(f"stop is {shown(self.stop)}. Allowed: up to {MAX_STOPS} texts, none empty", "stop")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(_Request):
    """POST /v1/completions. Several prompts are several requests: each is routed by itself."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
    # The engine knows the log-probability of the token that it chose, not those of the others.
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _echo_alone(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            raise ApiError.bad_request("echo and logprobs are both given, which is not supported. Leave one out", "echo")
        return self

    @property
    def prompts(self) -> list[str]:
        """The prompts, also where it is one."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class TextPart(BaseModel):
    """A piece of a message; only texts are supported."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of a conversation. The fields without text are those that a client sends back empty."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    audio: None = None
    tool_calls: None = None
    function_call: None = None
    annotations: list[Any] | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatCompletionRequest(_Request):
    """POST /v1/chat/completions. Retrieval asks for the last user message."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=256)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None

    @model_validator(mode="after")
    def _asks(self) -> "ChatCompletionRequest":
        if not self.query:
            raise ApiError.bad_request("messages holds no text of the role user. Send one: it is what is routed", "messages")
        return self

    @property
    def query(self) -> str:
        """The last user message."""
        return next((message.text for message in reversed(self.messages) if message.role == "user"), "")


class RouteRequest(BaseModel):
    """POST /v1/route."""

    model_config = ConfigDict(extra="forbid")

    input: Text
    p: Share | None = None
    top_k: Annotated[int, Field(ge=1, le=1000)] | None = None


class AppliedComposition(BaseModel):
    """What was composed for an answer; no weights at all is the base model."""

    method: str
    weights: dict[str, float]
    density: float


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
    """The tokens of a choice; `top_logprobs` holds the chosen token alone."""

    tokens: list[str]
    token_logprobs: list[float]
    text_offset: list[int]
    top_logprobs: list[dict[str, float]] | None


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


class TokenLogprob(BaseModel):
    """A token of a chat answer; `bytes` is its UTF-8."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Any] = []


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


class RoutedNeighbour(BaseModel):
    """A row of a corpus near the input; `similarity` is a cosine."""

    task: str
    text: str
    similarity: float


class RouteTimings(BaseModel):
    """Where the time of a route went, in milliseconds."""

    retrieval_ms: float
    weighing_ms: float
    total_ms: float


class RouteResponse(BaseModel):
    """The answer of /v1/route: weights of the nucleus (they sum to 1), and every task's share before the cut."""

    input: str
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


def shown(value: object) -> str:
    """A value as an error names it, not longer than a line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
