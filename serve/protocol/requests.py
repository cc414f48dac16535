"""Request bodies: OpenAI's completions and chat completions with `composition`, and LoRAFleet's own.

A field of OpenAI's that is not supported here is accepted where its value has no effect. Every other unknown field is
refused by name.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    TypeAdapter,
    WrapValidator,
    field_validator,
    model_validator,
)

from lorafleet.composition.composition import LEAST_DENSITY
from lorafleet.config import MethodName, WeigherName
from lorafleet.engine.requests import MOST_LIKELIEST, MOST_STOP_CHARACTERS
from lorafleet.errors import closest, shown
from serve.errors import ApiError
from serve.json_body import MAX_NAME, RepeatedName

METHODS: tuple[str, ...] = get_args(MethodName)
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
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "user": ANYTHING,
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}

Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Share = Annotated[StrictFloat, Field(gt=0, le=1)]
MOST_WEIGHT = 100.0
"""Of an adapter, either way: what is far beyond gives numbers that no number format holds."""
MOST_PENALTY = 100.0
"""Of unit vectors no weight is negative from 4 on: more changes nothing but the solver's scale."""


def by_shape(choose: Callable[[Any], int], *kinds: Any) -> WrapValidator:
    """Validate a union's value as the one of its types that the value's shape means.

    Pydantic puts the names of a union's types into the path of an error, where a field or a task may have the same name.

    Args:
        choose: the place of a value's type among `kinds`.
    """
    adapters = [TypeAdapter[Any](kind) for kind in kinds]
    return WrapValidator(lambda value, union: adapters[choose(value)].validate_python(value))


def _is_list(value: object) -> bool:
    return isinstance(value, list)


class Retrieval(BaseModel):
    """How weights are found: `top_k` neighbours and a weigher, each with settings of its own.

    `nucleus` has `p`; all others have `k` (how many adapters they keep), `softmax` and `prototypes` also `temperature`,
    `sparse_projection` also `penalty`. Each has `sharpness`, the power that similarities are taken to, and `abstain_below`,
    the cosine of the nearest row below which the base model answers alone.
    """

    model_config = ConfigDict(extra="forbid")

    weigher: WeigherName | None = None
    p: Share | None = None
    k: Annotated[StrictInt, Field(ge=1, le=1000)] | None = None
    temperature: Annotated[StrictFloat, Field(gt=0, allow_inf_nan=False)] | None = None
    penalty: Annotated[StrictFloat, Field(ge=0, le=MOST_PENALTY)] | None = None
    sharpness: Annotated[StrictFloat, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    abstain_below: Annotated[StrictFloat, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[StrictInt, Field(ge=1, le=1000)] | None = None
    neighbours: StrictBool | None = None


class CompositionRequest(Retrieval):
    """Which composition a request wants: `weights` outright, or those that retrieval finds.

    With `neighbours` the answer shows the rows of the corpora that the weights come from.
    """

    method: Name | None = None
    weights: dict[str, Annotated[StrictFloat, Field(ge=-MOST_WEIGHT, le=MOST_WEIGHT, allow_inf_nan=False)]] | None = None
    density: Annotated[StrictFloat, Field(ge=LEAST_DENSITY, le=1)] | None = None

    @field_validator("method")
    @classmethod
    def _known(cls, method: str | None) -> str | None:
        if method is not None and method not in METHODS:
            raise ValueError(closest(method, METHODS))
        return method

    @property
    def by_retrieval(self) -> tuple[str, ...]:
        """The fields in it that only retrieval reads."""
        # By identity: a setting of 0 equals False, and is a wish all the same.
        return tuple(name for name in Retrieval.model_fields if all(getattr(self, name) is not no for no in (None, False)))

    @model_validator(mode="after")
    def _one_way(self) -> "CompositionRequest":
        if self.weights is not None and self.by_retrieval:
            field = f"composition.{self.by_retrieval[0]}"
            raise ApiError.bad_request(
                f"{field} and composition.weights are both given. Leave one out: they are given, or found",
                field,
            )
        return self


class StreamOptions(BaseModel):
    """Options of a stream. Nothing is obfuscated here."""

    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None


class Body(BaseModel):
    """The body of a request."""

    @model_validator(mode="wrap")
    @classmethod
    def _named_once(cls, body: Any, whole: Callable[[Any], Any]) -> Any:
        read = whole(body)
        if isinstance(body, RepeatedName):
            raise ApiError.bad_request(f"{body.name} is given twice. Leave one out", body.name)
        return read


class _Request(Body):
    """What both kinds of completion share."""

    model_config = ConfigDict(extra="allow")

    model: Name = "auto"
    composition: CompositionRequest | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[StrictFloat, Field(ge=0, le=2)] | None = None
    top_p: Share | None = None
    n: Annotated[StrictInt, Field(ge=1)] | None = None
    stop: Annotated[str | Texts, by_shape(_is_list, str, Texts)] | None = None
    seed: StrictInt | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _supported(self) -> "_Request":
        if self.stream_options is not None and not self.stream:
            raise ApiError.bad_request("stream_options is given, and stream is not true. Leave one out", "stream_options")
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
        for place, stop in enumerate(stops):
            if len(stop) > MOST_STOP_CHARACTERS:
                field = "stop" if isinstance(self.stop, str) else f"stop.{place}"
                message = f"{field} has {len(stop)} characters. Allowed: at most {MOST_STOP_CHARACTERS}"
                raise ApiError.bad_request(message, field)
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk for the usage alone."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


# The first bad one of a million is enough.
Prompts = Annotated[list[Text], Field(fail_fast=True, min_length=1)]
Ids = Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(fail_fast=True, min_length=1)]
ManyIds = Annotated[list[Ids], Field(fail_fast=True, min_length=1)]


def _kind_of_prompt(prompt: object) -> int:
    if not isinstance(prompt, list):
        return 0
    first = prompt[0] if prompt else ""
    return 3 if isinstance(first, list) else 2 if isinstance(first, int) else 1


class CompletionRequest(_Request):
    """POST /v1/completions. Several prompts are several requests: each is routed by itself. Token ids are prompts too."""

    prompt: Annotated[Text | Prompts | Ids | ManyIds, by_shape(_kind_of_prompt, Text, Prompts, Ids, ManyIds)]
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=5)] | None = None
    echo: StrictBool | None = None

    @model_validator(mode="after")
    def _echoes(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ApiError.bad_request("max_tokens is 0. Allowed: at least 1, or 0 with echo", "max_tokens")
        if self.echo and self.logprobs is not None and self.stream:
            message = "stream, echo and logprobs are all given, which is not supported. Leave one out"
            raise ApiError.bad_request(message, "stream")
        return self

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """The prompts, also where it is one."""
        match self.prompt:
            case str():
                return [self.prompt]
            case [int(), *_]:
                return [tuple(self.prompt)]
            case _:
                return [prompt if isinstance(prompt, str) else tuple(prompt) for prompt in self.prompt]


class TextPart(BaseModel):
    """A piece of a message; only texts are supported."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


TextParts = Annotated[list[TextPart], Field(fail_fast=True)]


class ChatMessage(BaseModel):
    """One message of a conversation. The fields without text are those that a client sends back empty."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | TextParts, by_shape(_is_list, str, TextParts)]
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

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=256)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LIKELIEST)] | None = None

    @model_validator(mode="after")
    def _asks(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError.bad_request("top_logprobs is given, and logprobs is not true. Set it", "top_logprobs")
        if not self.query:
            raise ApiError.bad_request("messages holds no text of the role user. Send one: it is what is routed", "messages")
        return self

    @property
    def query(self) -> str:
        """The last user message."""
        return next((message.text for message in reversed(self.messages) if message.role == "user"), "")


class RouteRequest(Body, Retrieval):
    """POST /v1/route. `neighbours: false` leaves them out of the answer."""

    input: Text


AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=96)]
Location = Annotated[str, Field(min_length=1, max_length=4096)]
AdapterRow = Annotated[str | dict[str, Any], by_shape(lambda row: isinstance(row, dict), str, dict[str, Any])]


class AdapterRequest(Body):
    """POST /v1/adapters: a PEFT folder and its corpus; without rows it is found by its name alone, or by its task's rows.

    `source` and `corpus` are paths or file:// URIs below one of serving.adapter_roots. A row is a text, an object with a
    `text`, or one with the columns of the catalogue's task of that name; `task` is `name` where it is absent.
    """

    model_config = ConfigDict(extra="forbid")

    name: AdapterName
    source: Location
    task: AdapterName | None = None
    rows: Annotated[list[AdapterRow], Field(fail_fast=True, min_length=1)] | None = None
    corpus: Location | None = None

    @model_validator(mode="after")
    def _one_corpus(self) -> "AdapterRequest":
        if self.rows is not None and self.corpus is not None:
            raise ApiError.bad_request("rows and corpus are both given. Leave one out", "corpus")
        return self

    @property
    def task_name(self) -> str:
        """The task, also where it has none of its own."""
        return self.task or self.name
