"""The HTTP endpoint: OpenAI's wire format outside, the graph of deployments inside. It holds no model and no index.

`serve.ingress` copies the application with the class's methods, and with those names of this module that are there by then:
what the methods call has to stand above the class, or in another module.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Header, Response
from pydantic import BaseModel
from ray import serve
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from lorafleet.adapters import StoredAdapter, stored_adapters
from lorafleet.config import Settings
from lorafleet.errors import LoRAFleetError, RequestError
from serve.answers import chat_response, completion_response, json_response, milliseconds_since
from serve.body_limit import BodyLimit, limit_by
from serve.calls import answered, over_grpc
from serve.choosing import AUTO, BASE, Choice, Wish, choose, task_of_model, wish_of
from serve.chunks import ChatWording, Chunks, CompletionWording
from serve.deadline import Deadline
from serve.errors import AWAY_RETRY_SECONDS, SERVER_ERROR, ApiError, answer_errors, awaited, sentence
from serve.follower import Follower, Published
from serve.guard import KeyGuard, guard_by
from serve.hanging_up import HangingUp
from serve.in_flight import InFlight, those_of_before_are_over
from serve.json_body import JsonRoute
from serve.listing import listed, listed_adapter
from serve.messages import Completed, Found, Order, Sampling, Weighed
from serve.metrics import RequestMetrics
from serve.page_routes import router
from serve.protocol.requests import AdapterRequest, ChatCompletionRequest, CompletionRequest, RouteRequest
from serve.protocol.responses import (
    AdapterList,
    AdapterRemoved,
    ChatCompletionChunk,
    ChatCompletionResponse,
    CompletionChunk,
    CompletionResponse,
    ErrorResponse,
    Health,
    ListedAdapter,
    ModelCard,
    ModelList,
    RoutedNeighbour,
    RouteResponse,
    RouteTimings,
)
from serve.streaming import EventStream, Merged

READY_SECONDS = 8
POOL_SECONDS = 2
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        400: "A field of the request is wrong; `param` names it",
        401: "There are API keys, and the request has none of them",
        404: "No such model or adapter",
        413: "The body is larger than serving.body_kib",
        415: "The body is no JSON (Content-Type), or compressed (Content-Encoding)",
        429: "Too many requests are waiting; see Retry-After",
        503: "The index, or a part of the endpoint, is away; see Retry-After",
        500: "A fault of the endpoint; its log has more",
        504: "No answer within serving.request_timeout_seconds, or X-Request-Timeout",
    }.items()
}
POOL_ERRORS: dict[int | str, dict[str, Any]] = {
    status: ERRORS[status] for status in (400, 401, 404, 413, 415, 500, 503, 504)
} | {
    403: {"model": ErrorResponse, "description": "The API key is not one of the role admin"},
    409: {"model": ErrorResponse, "description": "The name is taken, or another change is under way; see Retry-After"},
}
Timeout = Annotated[
    float | None,
    Header(alias="X-Request-Timeout", gt=0, allow_inf_nan=False, description="Seconds within which to answer, or 504"),
]
Query = str | Callable[[], DeploymentResponse]
"""The text that retrieval asks for, or how to come by it."""
Asked = tuple[Query, Order]


def streamed(chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """How a stream of chunks is documented."""
    events = {"type": "string", "description": f"Events `data: {{...}}`, each a {chunk.__name__}, and `data: [DONE]`"}
    return {200: {"content": {"text/event-stream": {"schema": events}}, "description": "The answer, or its events"}}


def engines_take(settings: Settings) -> int:
    """How many answers the engines of all generators compute and keep waiting at once."""
    generation, scaling = settings.generation, settings.serving.generator
    return (generation.rows + generation.waiting) * max(scaling.min_replicas, scaling.max_replicas, 1)


api = FastAPI(
    title="LoRAFleet",
    description="One endpoint that composes the right LoRA adapters for every request.",
    # The only 422 there could be is answered as 400.
    responses={422: {"model": ErrorResponse, "description": "Never: see 400"}},
)
api.router.route_class = JsonRoute
api.add_middleware(BodyLimit)
api.add_middleware(InFlight)
api.add_middleware(KeyGuard)
# It sees what the others refuse.
api.add_middleware(RequestMetrics)
# The last one is the outermost.
api.add_middleware(HangingUp)
answer_errors(api)
api.include_router(router)


@serve.deployment(name="Gateway")
@serve.ingress(api)
class Gateway:
    """Reads requests, sends them down the graph, and writes answers."""

    async def __init__(  # type: ignore[misc]
        self,
        settings: Settings,
        retriever: DeploymentHandle,
        weigher: DeploymentHandle,
        generator: DeploymentHandle,
        pool: DeploymentHandle,
    ) -> None:
        self._settings = settings
        self._retriever, self._weigher, self._generator = map(over_grpc, (retriever, weigher, generator))
        self._streaming = self._generator.options(stream=True)
        self._roster = stored_adapters(settings)
        self._started = int(time.time())
        guard_by(settings)
        limit_by(settings)
        self._pool = pool
        self._published = Published(loaded=self._roster, shown=self._roster)
        self._left_out: Mapping[str, str] = {}
        self._follower = Follower(pool, "gateway", self._take_adapters, those_of_before_are_over)
        await self._follower.start()

    @api.post("/v1/completions", response_model=CompletionResponse, responses=ERRORS | streamed(CompletionChunk))
    async def complete(self, request: CompletionRequest, x_request_timeout: Timeout = None) -> Response:
        """Continue one or several prompts, each under the composition that it asks for or that retrieval finds."""
        start, deadline = time.perf_counter(), self._deadline(x_request_timeout)
        choice = choose(request.model, request.composition, self._roster)
        sampling = self._sampling(request, request.max_tokens, "max_tokens", request.logprobs)
        sampling = replace(sampling, echo=bool(request.echo))
        allowed = self._settings.serving.prompts
        if len(request.prompts) > allowed:
            raise RequestError(f"prompt has {len(request.prompts)} texts", f"Allowed: {allowed} (serving.prompts)", "prompt")
        answers, at_once = len(request.prompts) * sampling.n, engines_take(self._settings)
        if answers > at_once:
            # Or it would be told to try again for ever.
            asked = f"{len(request.prompts)} prompts with n={sampling.n} ask for {answers} answers"
            bound = f"Allowed: {at_once} (generation.rows and generation.waiting of all generators)"
            raise RequestError(asked, bound, "prompt" if sampling.n == 1 else "n")
        orders = [(self._query(prompt), Order(prompt, choice, sampling)) for prompt in request.prompts]
        if request.stream:
            chunks = Chunks(CompletionWording(request), sampling.n, request.include_usage, start)
            return await self._stream(orders, chunks, deadline)
        completed = await self._complete(orders, deadline)
        return await json_response(partial(completion_response, request, completed, start), request.logprobs is not None)

    @api.post(
        "/v1/chat/completions", response_model=ChatCompletionResponse, responses=ERRORS | streamed(ChatCompletionChunk)
    )
    async def chat(self, request: ChatCompletionRequest, x_request_timeout: Timeout = None) -> Response:
        """Answer a conversation; retrieval asks for its last user message."""
        start, deadline = time.perf_counter(), self._deadline(x_request_timeout)
        choice = choose(request.model, request.composition, self._roster)
        likeliest = (request.top_logprobs or 0) if request.logprobs else None
        if request.max_completion_tokens is not None:
            sampling = self._sampling(request, request.max_completion_tokens, "max_completion_tokens", likeliest)
        else:
            sampling = self._sampling(request, request.max_tokens, "max_tokens", likeliest)
        conversation = tuple(
            ("system" if message.role == "developer" else message.role, message.text) for message in request.messages
        )
        orders = [(request.query, Order(conversation, choice, sampling))]
        if request.stream:
            chunks = Chunks(ChatWording(request), sampling.n, request.include_usage, start)
            return await self._stream(orders, chunks, deadline)
        (completed,) = await self._complete(orders, deadline)
        return await json_response(partial(chat_response, request, completed, start), bool(request.logprobs))

    @api.post("/v1/route", response_model=RouteResponse, responses=ERRORS)
    async def route(self, request: RouteRequest, x_request_timeout: Timeout = None) -> RouteResponse:
        """Neighbours, task weights and nucleus of a text; nothing is generated."""
        start, deadline = time.perf_counter(), self._deadline(x_request_timeout)
        wish = wish_of(request)
        found, weighed = await deadline.within(self._found(request.input, wish, request.neighbours is not False))
        rows = () if request.neighbours is False else found.neighbours
        return RouteResponse(
            input=request.input,
            weigher=weighed.weigher,
            weights=dict(weighed.weights),
            shares=dict(weighed.shares),
            nucleus=list(weighed.weights),
            neighbours=[RoutedNeighbour(task=row.task, text=row.text, similarity=row.similarity) for row in rows],
            timings=RouteTimings(
                retrieval_ms=weighed.retrieval_ms, weighing_ms=weighed.weighing_ms, total_ms=milliseconds_since(start)
            ),
        )

    @api.get("/v1/models", response_model=ModelList, responses={401: ERRORS[401]})
    async def models(self) -> ModelList:
        """What `model` may name: auto, base, and every adapter."""
        adapters = map(self._card, self._roster.adapters.values())
        return ModelList(data=[*(ModelCard(id=name, created=self._started) for name in (AUTO, BASE)), *adapters])

    @api.get("/v1/models/{model}", response_model=ModelCard, responses={status: ERRORS[status] for status in (401, 404)})
    async def model(self, model: str) -> ModelCard:
        """One of them; an adapter goes by its task too."""
        if model in (AUTO, BASE):
            return ModelCard(id=model, created=self._started)
        return self._card(self._roster.adapters[task_of_model(model, self._roster)])

    @api.get("/healthz", response_model=Health)
    async def healthz(self) -> Health:
        """The process is alive."""
        return Health()

    @api.get("/readyz", response_model=Health, responses={503: ERRORS[503]})
    async def readyz(self) -> Health:
        """The index has rows, and a generator is loaded."""
        checks = {"retriever": self._retriever.check_ready.remote(), "generator": self._generator.check_ready.remote()}
        try:
            for name, check in checks.items():
                waited_for = name
                await asyncio.wait_for(awaited(check), READY_SECONDS)
        except asyncio.TimeoutError:
            reason = f"the {waited_for} is not loaded yet"
        except LoRAFleetError as error:
            reason = sentence(error)
        else:
            return Health()
        raise ApiError(503, reason, SERVER_ERROR, code="not_ready", retry_after=AWAY_RETRY_SECONDS)

    def _deadline(self, seconds: float | None) -> Deadline:
        """By when a request has to be answered; it may ask for less time than the settings give, not for more."""
        longest = self._settings.serving.request_timeout_seconds
        return Deadline(longest if seconds is None else min(seconds, longest))

    def _sampling(
        self,
        request: CompletionRequest | ChatCompletionRequest,
        max_tokens: int | None,
        field: str,
        likeliest: int | None,
    ) -> Sampling:
        generation = self._settings.generation
        if max_tokens is not None and max_tokens > generation.max_new_tokens:
            raise RequestError(f"{field} is {max_tokens}", f"Allowed: at most {generation.max_new_tokens}", field=field)
        choices = self._settings.serving.choices
        if request.n is not None and request.n > choices:
            raise RequestError(f"n is {request.n}", f"Allowed: at most {choices} (serving.choices)", field="n")
        return Sampling(
            min(generation.max_tokens, generation.max_new_tokens) if max_tokens is None else max_tokens,
            # OpenAI's defaults.
            1.0 if request.temperature is None else request.temperature,
            1.0 if request.top_p is None else request.top_p,
            request.seed,
            request.stops,
            request.n or 1,
            likeliest,
        )

    async def _complete(self, orders: Sequence[Asked], deadline: Deadline) -> list[Completed]:
        """Carry out orders, each one by itself."""
        return await deadline.all_within(self._completed(query, order) for query, order in orders)

    async def _completed(self, query: Query, order: Order) -> Completed:
        """Carry out an order."""
        weights = await self._weighing(query, order.choice)
        # Once: what kills one generator would kill the next, too.
        completed: Completed = await answered(lambda: self._generator.complete.remote(order, weights), tries=1)
        return completed

    async def _stream(self, orders: Sequence[Asked], chunks: Chunks[Any], deadline: Deadline) -> EventStream:
        """Carry out orders piece by piece; what fails before the engine has taken them is an error with its status."""
        weights = await deadline.all_within(self._weighing(query, order.choice) for query, order in orders)
        merged = Merged([self._streaming.stream.remote(order, one) for (_, order), one in zip(orders, weights, strict=True)])
        try:
            begun = await deadline.within(merged.begun())
        except BaseException:
            merged.close()
            raise
        return EventStream(merged, begun, chunks, deadline)

    def _query(self, prompt: str | tuple[int, ...]) -> Query:
        """The text that retrieval asks for: token ids are read by the generator, which has the tokenizer."""
        return prompt if isinstance(prompt, str) else partial(self._generator.text_of.remote, prompt)

    async def _weighing(self, query: Query, choice: Choice) -> Weighed | None:
        """The weights that an order leaves to retrieval; None where it names them itself."""
        if choice.weights is not None:
            return None
        text = query if isinstance(query, str) else await answered(query)
        _, weighed = await self._found(text, choice.wish, choice.wish.neighbours)
        return weighed

    async def _found(self, text: str, wish: Wish, neighbours: bool) -> tuple[Found, Weighed]:
        """What the retriever finds for a text, and what the weigher makes of it."""
        found: Found = await answered(lambda: self._retriever.find.remote(text, wish.top_k, neighbours, wish.weigher))
        weighed: Weighed = await answered(lambda: self._weigher.weigh.remote(found, wish))
        return found, weighed

    def _card(self, adapter: StoredAdapter) -> ModelCard:
        return ModelCard(
            id=adapter.name,
            created=adapter.created or self._started,
            task=adapter.task,
            family=adapter.family,
        )

    @api.get("/v1/adapters", response_model=AdapterList, responses={401: ERRORS[401]})
    async def adapters(self) -> AdapterList:
        """The pool: every adapter, also one that comes in or goes."""
        # While the pool is away, what it said last.
        with suppress(Exception):
            self._left_out = await asyncio.wait_for(awaited(self._pool.left_out.remote()), POOL_SECONDS)
        return await asyncio.to_thread(listed, self._published, self._left_out)

    @api.post("/v1/adapters", response_model=ListedAdapter, status_code=201, responses=POOL_ERRORS)
    async def add_adapter(self, request: AdapterRequest) -> ListedAdapter:
        """Take an adapter into the pool; when this answers, every request may name it and retrieval may find it."""
        return await asyncio.to_thread(listed_adapter, await self._changed(self._pool.add.remote(request)))

    @api.delete("/v1/adapters/{name}", response_model=AdapterRemoved, responses=POOL_ERRORS)
    async def remove_adapter(self, name: str) -> AdapterRemoved:
        """Take an adapter out of the pool, by its name or task; requests that began before are answered as ever."""
        adapter = await self._changed(self._pool.remove.remote(name))
        return AdapterRemoved(name=adapter.name)

    async def _changed(self, change: DeploymentResponse) -> StoredAdapter:
        """The adapter that came or went; a change that takes longer goes on without us."""
        try:
            adapter: StoredAdapter = await asyncio.wait_for(awaited(change), self._settings.serving.request_timeout_seconds)
        except asyncio.TimeoutError:
            message = "the change takes longer than serving.request_timeout_seconds, and goes on. See GET /v1/adapters"
            raise ApiError(504, message, SERVER_ERROR, code="timeout") from None
        return adapter

    async def _take_adapters(self, published: Published) -> None:
        self._published, self._roster = published, published.shown
