"""The HTTP endpoint: OpenAI's wire format outside, the graph of deployments inside. It holds no model and no index.

`serve.ingress` copies the application with the class's methods, and with those names of this module that are there by then:
what the methods call has to stand above the class, or in another module.
"""

import asyncio
import time
import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from lorafleet.adapters import StoredAdapter, stored_adapters
from lorafleet.config import Settings
from lorafleet.errors import LoRAFleetError, RequestError
from serve.answers import applied, chat_logprobs, completion_logprobs, milliseconds_since, timings, usage
from serve.body_limit import BodyLimit
from serve.choosing import AUTO, BASE, Choice, choose
from serve.errors import AWAY_RETRY_SECONDS, SERVER_ERROR, ApiError, answer_errors, awaited, sentence
from serve.messages import Completed, Found, Order, Sampling, Weighed
from serve.protocol import (
    AnswerMessage,
    ChatChoice,
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
    ErrorResponse,
    Health,
    ModelCard,
    ModelList,
    RoutedNeighbour,
    RouteRequest,
    RouteResponse,
    RouteTimings,
)

READY_SECONDS = 8
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        400: "A field of the request is wrong; `param` names it",
        404: "No such model or adapter",
        413: "The body is larger than 1 MiB",
        429: "Too many requests are waiting; see Retry-After",
        503: "The index, or a part of the endpoint, is away; see Retry-After",
        504: "No answer within serving.request_timeout_seconds",
    }.items()
}

api = FastAPI(
    title="LoRAFleet",
    description="One endpoint that composes the right LoRA adapters for every request.",
    # The only 422 there could be is answered as 400.
    responses={422: {"model": ErrorResponse, "description": "Never: see 400"}},
)
api.add_middleware(BodyLimit)
answer_errors(api)


@serve.deployment(name="Gateway")
@serve.ingress(api)
class Gateway:
    """Reads requests, sends them down the graph, and writes answers."""

    def __init__(
        self, settings: Settings, retriever: DeploymentHandle, weigher: DeploymentHandle, generator: DeploymentHandle
    ) -> None:
        self._settings = settings
        self._retriever, self._weigher, self._generator = retriever, weigher, generator
        self._roster = stored_adapters(settings)
        self._started = int(time.time())

    @api.post("/v1/completions", response_model=CompletionResponse, responses=ERRORS)
    async def complete(self, request: CompletionRequest) -> CompletionResponse:
        """Continue one or several prompts, each under the composition that it asks for or that retrieval finds."""
        start = time.perf_counter()
        choice = choose(request.model, request.composition, self._roster)
        sampling = self._sampling(request, request.max_tokens, "max_tokens")
        prompts = request.prompts
        completed = await self._complete([(prompt, Order(prompt, choice, sampling)) for prompt in prompts])
        several = len(prompts) > 1
        choices = [
            CompletionChoice(
                index=index,
                text=(prompt if request.echo else "") + continuation.generation.text,
                finish_reason=continuation.generation.finish_reason,
                logprobs=None if request.logprobs is None else completion_logprobs(continuation, request.logprobs),
                composition=applied(answer) if several else None,
            )
            for index, (prompt, answer, continuation) in enumerate(
                (prompt, answer, continuation)
                for prompt, answer in zip(prompts, completed, strict=True)
                for continuation in answer.continuations
            )
        ]
        return CompletionResponse(
            id=f"cmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=request.model,
            choices=choices,
            usage=usage(completed),
            composition=applied(completed[0]),
            timings=timings(completed, start),
        )

    @api.post("/v1/chat/completions", response_model=ChatCompletionResponse, responses=ERRORS)
    async def chat(self, request: ChatCompletionRequest) -> ChatCompletionResponse:
        """Answer a conversation; retrieval asks for its last user message."""
        start = time.perf_counter()
        choice = choose(request.model, request.composition, self._roster)
        if request.max_completion_tokens is not None:
            sampling = self._sampling(request, request.max_completion_tokens, "max_completion_tokens")
        else:
            sampling = self._sampling(request, request.max_tokens, "max_tokens")
        conversation = tuple(
            ("system" if message.role == "developer" else message.role, message.text) for message in request.messages
        )
        completed = await self._complete([(request.query, Order(conversation, choice, sampling))])
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage(content=continuation.generation.text),
                finish_reason=continuation.generation.finish_reason,
                logprobs=chat_logprobs(continuation) if request.logprobs else None,
            )
            for index, continuation in enumerate(completed[0].continuations)
        ]
        return ChatCompletionResponse(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=request.model,
            choices=choices,
            usage=usage(completed),
            composition=applied(completed[0]),
            timings=timings(completed, start),
        )

    @api.post("/v1/route", response_model=RouteResponse, responses=ERRORS)
    async def route(self, request: RouteRequest) -> RouteResponse:
        """Neighbours, task weights and nucleus of a text; nothing is generated."""
        start = time.perf_counter()
        finding = self._retriever.find.remote(request.input, request.top_k)
        weighing = self._weigher.weigh.remote(finding, request.p)
        found: Found
        weighed: Weighed
        found, weighed = await self._answers([finding, weighing])
        return RouteResponse(
            input=request.input,
            weights=dict(weighed.weights),
            shares=dict(weighed.shares),
            nucleus=list(weighed.weights),
            neighbours=[
                RoutedNeighbour(task=row.task, text=row.text, similarity=row.similarity) for row in found.neighbours
            ],
            timings=RouteTimings(
                retrieval_ms=weighed.retrieval_ms, weighing_ms=weighed.weighing_ms, total_ms=milliseconds_since(start)
            ),
        )

    @api.get("/v1/models", response_model=ModelList)
    async def models(self) -> ModelList:
        """What `model` may name: auto, base, and every adapter."""
        adapters = [
            ModelCard(
                id=adapter.name,
                created=self._created(adapter),
                task=adapter.task,
                family=adapter.card.family if adapter.card else None,
            )
            for adapter in self._roster.adapters.values()
        ]
        return ModelList(data=[*(ModelCard(id=name, created=self._started) for name in (AUTO, BASE)), *adapters])

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

    def _sampling(self, request: CompletionRequest | ChatCompletionRequest, max_tokens: int | None, field: str) -> Sampling:
        generation = self._settings.generation
        if max_tokens is not None and max_tokens > generation.max_new_tokens:
            raise RequestError(f"{field} is {max_tokens}", f"Allowed: at most {generation.max_new_tokens}", field=field)
        return Sampling(
            max_tokens or min(generation.max_tokens, generation.max_new_tokens),
            # OpenAI's defaults.
            1.0 if request.temperature is None else request.temperature,
            1.0 if request.top_p is None else request.top_p,
            request.seed,
            request.stops,
            request.n or 1,
        )

    async def _complete(self, orders: Sequence[tuple[str, Order]]) -> list[Completed]:
        """Carry out orders, each with the query that retrieval asks for where it has no weights of its own."""
        answers: list[Completed] = await self._answers(
            [self._generator.complete.remote(order, self._weighing(query, order.choice)) for query, order in orders]
        )
        return answers

    def _weighing(self, query: str, choice: Choice) -> DeploymentResponse | None:
        """The weights to come: neighbours go from retriever to weigher, weights to the generator, past this process."""
        if choice.weights is not None:
            return None
        return self._weigher.weigh.remote(self._retriever.find.remote(query, choice.top_k), choice.p)

    async def _answers(self, responses: Sequence[DeploymentResponse]) -> list[Any]:
        """All answers; with the first that fails, or is late, the others are called off."""
        waiting = asyncio.gather(*(awaited(response) for response in responses))
        try:
            return await asyncio.wait_for(waiting, self._settings.serving.request_timeout_seconds)
        except BaseException:
            for response in responses:
                response.cancel()
            raise

    def _created(self, adapter: StoredAdapter) -> int:
        return int(datetime.fromisoformat(adapter.card.date).timestamp()) if adapter.card else self._started
