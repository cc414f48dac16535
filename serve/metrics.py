"""What the endpoint counts and times: Ray's exporter offers it to Prometheus as `ray_lorafleet_...`.

Every deployment makes its own measures within its replica: Ray adds the tags deployment, replica and application. All other
tags are bounded: an endpoint is one of the application's paths, a task one of the pool's. Texts are never measured.
"""

import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ray.serve.metrics import Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorafleet.composition import Composition
from lorafleet.engine import Generation
from serve.messages import Found, Weighed

if TYPE_CHECKING:
    from lorafleet.engine import Engine

SAMPLE_SECONDS = 1.0
HUNG_UP = 499
"""The status of a request whose client left before the answer was whole; no client ever sees it."""
OTHER = "other"
SECONDS: list[float] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120]
TASKS: list[float] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64]
# Cosine distances: below 0.3 a row says nearly the same, above 0.7 it is about something else.
DISTANCES: list[float] = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9, 1]


class RequestMetrics:
    """ASGI middleware: requests by endpoint and status, how many are in flight, and how long they take, streams whole."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._requests = Counter(
            "lorafleet_requests_total", "Requests that were answered, 499 where the client hung up", ("endpoint", "status")
        )
        self._seconds = Histogram(
            "lorafleet_request_seconds", "From a request to the end of its answer", SECONDS, ("endpoint",)
        )
        self._in_flight = Gauge("lorafleet_requests_in_flight", "Requests whose answer is not whole yet")
        self._flying = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, watching its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, whole, left = 500, False, False

        async def listening() -> Message:
            nonlocal left
            message = await receive()
            left = left or (message["type"] == "http.disconnect" and not whole)
            return message

        async def watched(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        start = asyncio.get_running_loop().time()
        self._fly(1)
        try:
            await self._app(scope, listening, watched)
        except asyncio.CancelledError:
            left = True
            raise
        finally:
            self._fly(-1)
            endpoint = _endpoint(scope)
            self._requests.inc(tags={"endpoint": endpoint, "status": str(HUNG_UP if left else status)})
            self._seconds.observe(asyncio.get_running_loop().time() - start, {"endpoint": endpoint})

    def _fly(self, more: int) -> None:
        self._flying += more
        self._in_flight.set(self._flying, {})


class WeighingMetrics:
    """What retrieval found, and what became of it."""

    def __init__(self) -> None:
        self._stages = _stages()
        self._nucleus = Histogram("lorafleet_nucleus_tasks", "Tasks among which a query's weight is shared", TASKS)
        self._distance = Histogram(
            "lorafleet_nearest_neighbour_distance",
            "1 less the cosine of a query and its nearest row: large for a query unlike every corpus",
            DISTANCES,
        )

    def observe(self, found: Found, weighed: Weighed) -> None:
        """Count one query."""
        self._stages.observe(weighed.retrieval_ms / 1000, {"stage": "retrieval"})
        self._stages.observe(weighed.weighing_ms / 1000, {"stage": "weighing"})
        self._nucleus.observe(len(weighed.weights), {})
        if found.neighbours:
            self._distance.observe(max(0.0, 1 - found.neighbours[0].similarity), {})


class GenerationMetrics:
    """What the engine did, and by whose weights.

    Args:
        engine: is looked at once a second, for as long as the process lives.
        rows: how many sequences it computes at once, at most.
    """

    def __init__(self, engine: "Engine", rows: int) -> None:
        self._engine, self._rows = engine, rows
        self._stages = _stages()
        self._first_token = Histogram(
            "lorafleet_first_token_seconds", "From a request's arrival at the engine to its first token", SECONDS
        )
        self._prompt_tokens = Counter("lorafleet_prompt_tokens_total", "Tokens of prompts")
        self._output_tokens = Counter("lorafleet_output_tokens_total", "Tokens of answers")
        self._weights = Counter(
            "lorafleet_adapter_weight_total", "Sum of the adapters' shares of the requests' weights", ("task",)
        )
        self._base = Counter("lorafleet_base_answers_total", "Answers of the base model, without an adapter")
        self._waiting = Gauge("lorafleet_requests_waiting", "Requests that wait for a row of the engine")
        self._running = Gauge("lorafleet_rows_running", "Sequences that the engine computes now")
        self._capacity = Gauge("lorafleet_rows", "Sequences that the engine computes at once, at most")
        self._adapters = Gauge("lorafleet_adapters", "Adapters in the pool")
        threading.Thread(target=self._sample, name="engine metrics", daemon=True).start()

    def observe(self, composition: Composition, generations: Sequence[Generation]) -> None:
        """Count the answers to one prompt that came whole; its tokens count once."""
        if not generations:
            return
        self._prompt_tokens.inc(generations[0].prompt_tokens, {})
        for generation in generations:
            waited, first = generation.seconds_waiting, generation.seconds_to_first_token
            self._stages.observe(waited, {"stage": "queue"})
            self._stages.observe(first, {"stage": "first_token"})
            self._first_token.observe(waited + first, {})
            if generation.choices:
                self._output_tokens.inc(len(generation.choices), {})
        shares = absolute_shares(composition.weights)
        for task, share in shares.items():
            # Of weights that are far apart the small one's share may be none that a float can hold.
            if share > 0:
                self._weights.inc(share, {"task": task})
        if not shares:
            self._base.inc(len(generations), {})

    def _sample(self) -> None:
        pause = threading.Event()
        while True:
            self._waiting.set(self._engine.waiting, {})
            self._running.set(self._engine.running, {})
            self._capacity.set(self._rows, {})
            self._adapters.set(len(self._engine.pool), {})
            pause.wait(SAMPLE_SECONDS)


def absolute_shares(weights: Mapping[str, float]) -> dict[str, float]:
    """The part that each task has in a composition, whatever the weights' sum and signs; those of weight 0 have none."""
    whole = sum(map(abs, weights.values()))
    return {task: abs(weight) / whole for task, weight in weights.items() if weight}


def _stages() -> Histogram:
    return Histogram("lorafleet_stage_seconds", "Time of one stage of a request", SECONDS, ("stage",))


def _endpoint(scope: Scope) -> str:
    """The path as the application declares it; what no route takes is one endpoint."""
    return str(getattr(scope.get("route"), "path", OTHER))
