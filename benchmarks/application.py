"""The whole application over HTTP against the bare engine in one process: same requests, same compositions.

    python -m benchmarks.application --replicas 2 --gpus 0.45 --rank 64 --in-flight 64 --tokens 64 --tokens 256

The fleet is made for it: the settings' base model with an end token that it never writes, so that every answer has its full
length, random adapters, and an index of random rows. First the application, gateways, retriever, weigher and as many
generators as said, driven over HTTP with so many requests in flight; half of the requests name their weights, half leave
them to retrieval. Then, when all replicas are gone, one engine answers the same prompts under the compositions that were
found; and as many engines as there were generators, each in a process of its own, answer a part of them each. The second
says what HTTP and the graph cost, the first what it costs to split the machine, too.
"""

import asyncio
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from queue import Empty
from typing import Annotated, Any

import httpx
import ray
import typer
from ray import serve
from rich.console import Console

from benchmarks.fleet import WORDS, random_adapters, write_adapter
from benchmarks.report import tell
from lorafleet.adapters import stored_adapters
from lorafleet.cli.service import RAY_ENVIRONMENT
from lorafleet.composition import Composition
from lorafleet.config import Models, Settings, load_settings
from lorafleet.engine import GenerationRequest
from lorafleet.fleet import load_engine
from lorafleet.models import load_base_model, load_tokenizer
from lorafleet.network import bypass_proxies
from lorafleet.retrieval import Encoder, Entry, open_for_writing, row_identifiers, server
from lorafleet.tasks import prompt_version
from serve.deploy import deploy

console = Console(stderr=True)

NEVER_WRITTEN = 15
"""A token of SmolLM2 for the scripts of notebooks."""
ROWS = 50
TEXTS = (
    "Where can I buy a tennis ball?",
    "Is this review positive or negative? 'Two hours of my life that nobody will give back to me.'",
    "The boy dropped the glass on the stone floor. What happened next: did it bounce, or did it break? Say why.",
    "A ship leaves the harbour at noon with the tide and sails against the wind. Explain why it cannot sail straight ahead.",
)


@dataclass(frozen=True)
class Workload:
    """What is asked: requests with answers of so many tokens, and what composed each of them."""

    tokens: int
    asked: Sequence[Mapping[str, Any]]
    composed: Sequence[Mapping[str, Any]]

    def part(self, number: int, parts: int) -> "Workload":
        """Every so manieth request."""
        return Workload(self.tokens, self.asked[number::parts], self.composed[number::parts])


@dataclass(frozen=True)
class Side:
    """One side: how long all requests took, and how many tokens were read and written."""

    name: str
    tokens: int
    requests: int
    seconds: float
    prompt_tokens: int
    output_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Output tokens."""
        return self.output_tokens / self.seconds


@dataclass(frozen=True)
class Part:
    """What one of several engines did of a workload; the times are of the clock that all processes of a machine share."""

    tokens: int
    began: float
    ended: float
    prompt_tokens: int
    output_tokens: int


def make_fleet(state: Path, adapters: int, rank: int) -> Path:
    """A base model that never ends an answer, with random adapters, in a state folder; returns the model's folder."""
    base = state / "base"
    settings = Models()
    model, tokenizer = load_base_model(settings, "float32"), load_tokenizer(settings)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = NEVER_WRITTEN
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    for adapter in random_adapters(model, adapters, rank):
        write_adapter(adapter, state / "adapters" / adapter.name)
    return base


def fill_index(settings: Settings, adapters: int) -> None:
    """So many random rows for every adapter."""
    draws, encoder = random.Random(0), Encoder(settings.models)
    for number in range(adapters):
        task = f"adapter-{number:02d}"
        texts = [f"{number} " + " ".join(draws.choices(WORDS, k=20)) for _ in range(ROWS)]
        entries = [Entry(name, task, text) for name, text in zip(row_identifiers(task, texts), texts, strict=True)]
        open_for_writing(settings, prompt_version()).write(entries, encoder.encode(texts, 32))


def bodies(adapters: Sequence[str], count: int, tokens: int) -> list[dict[str, Any]]:
    """Requests, each with a text of its own; half with two adapters' weights, half to be routed."""
    draws = random.Random(0)
    asked = []
    for number in range(count):
        prompt = f"{draws.choice(TEXTS)} ({number}) {draws.choice(TEXTS)}"
        body = {"model": "auto", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        if number % 2:
            first, second = draws.sample(list(adapters), 2)
            body["composition"] = {"method": "linear", "weights": {first: 0.6, second: 0.4}}
        asked.append(body)
    return asked


async def drive(url: str, asked: Sequence[Mapping[str, Any]], in_flight: int) -> tuple[float, list[dict[str, Any]]]:
    """Send all requests, so many at once; seconds, and the answers in order."""
    places = asyncio.Semaphore(in_flight)
    limits = httpx.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)

    async def one(http: httpx.AsyncClient, body: Mapping[str, Any]) -> dict[str, Any]:
        async with places:
            answer = await http.post(f"{url}/v1/completions", json=body)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    async with httpx.AsyncClient(limits=limits, timeout=600) as http:
        start = time.perf_counter()
        answers = await asyncio.gather(*(one(http, body) for body in asked))
        return time.perf_counter() - start, answers


def over_http(settings: Settings, count: int, lengths: Sequence[int], in_flight: int) -> tuple[list[Side], list[Workload]]:
    """The application's sides, with what was asked and what composed each answer."""
    began = time.perf_counter()
    url = deploy(settings)
    console.print(f"the endpoint is up after {time.perf_counter() - began:.1f} s", style="dim")
    listed = httpx.get(f"{url}/v1/models").json()["data"]
    adapters = [model["task"] for model in listed if model.get("task")]
    sides, workloads = [], []
    for tokens in lengths:
        asked = bodies(adapters, count, tokens)
        # Everything is warm before it is timed: every replica has met adapters, prompts and batches.
        asyncio.run(drive(url, asked[: 2 * in_flight], in_flight))
        seconds, answers = asyncio.run(drive(url, asked, in_flight))
        console.print(f"application over HTTP, {tokens} tokens: {seconds:.2f} s", style="dim")
        used = [answer["usage"] for answer in answers]
        read, written = (sum(one[f"{kind}_tokens"] for one in used) for kind in ("prompt", "completion"))
        sides.append(Side("application over HTTP", tokens, count, seconds, read, written))
        workloads.append(Workload(tokens, asked, [answer["composition"] for answer in answers]))
    return sides, workloads


def without_http(settings: Settings, workloads: Sequence[Workload], rows: int, engines: int, share: float) -> list[Side]:
    """So many engines, each in a process of its own that has its part of the requests and of the GPU; all begin at once."""
    fresh = multiprocessing.get_context("spawn")
    begin, told = fresh.Barrier(engines), fresh.Queue()
    processes = [
        fresh.Process(
            target=_one_engine,
            args=(settings, [one.part(number, engines) for one in workloads], -(-rows // engines), share, begin, told),
        )
        for number in range(engines)
    ]
    for process in processes:
        process.start()
    try:
        measured = [_told(told, processes) for _ in processes for _ in workloads]
    finally:
        for process in processes:
            process.terminate()
            process.join()
    sides = []
    for workload in workloads:
        parts = [part for part in measured if part.tokens == workload.tokens]
        seconds = max(part.ended for part in parts) - min(part.began for part in parts)
        read, written = sum(part.prompt_tokens for part in parts), sum(part.output_tokens for part in parts)
        name = "engine alone" if engines == 1 else f"{engines} engines alone"
        console.print(f"{name}, {workload.tokens} tokens: {seconds:.2f} s", style="dim")
        sides.append(Side(name, workload.tokens, len(workload.asked), seconds, read, written))
    return sides


def _told(told: "Queue[Part]", processes: Sequence[Any]) -> Part:
    while True:
        try:
            return told.get(timeout=1)
        except Empty:
            if any(process.exitcode for process in processes):
                raise SystemExit("an engine's process has ended; what it says is above") from None


def _one_engine(
    settings: Settings, workloads: Sequence[Workload], rows: int, share: float, begin: Barrier, told: "Queue[Part]"
) -> None:
    generation = settings.generation.model_copy(update={"rows": rows})
    settings = settings.model_copy(update={"generation": generation})
    engine = load_engine(settings, stored_adapters(settings), gpu_share=share)
    engine.warm_up()
    for workload in workloads:
        requests = [
            GenerationRequest(
                body["prompt"], Composition(one["method"], one["weights"], settings.composing.density), body["max_tokens"]
            )
            for body, one in zip(workload.asked, workload.composed, strict=True)
        ]
        engine.generate(requests[: 2 * rows])
        begin.wait()
        began = time.clock_gettime(time.CLOCK_MONOTONIC)
        answers = engine.generate(requests)
        ended = time.clock_gettime(time.CLOCK_MONOTONIC)
        read, written = sum(answer.prompt_tokens for answer in answers), sum(len(answer.choices) for answer in answers)
        told.put(Part(workload.tokens, began, ended, read, written))
        # None begins with what comes next while another is not done.
        begin.wait()


def main(
    adapters: Annotated[int, typer.Option(min=2)] = 22,
    rank: Annotated[int, typer.Option(min=1)] = 16,
    gateways: Annotated[int, typer.Option(min=1)] = 1,
    replicas: Annotated[int, typer.Option(min=1, help="Generators")] = 2,
    gpus: Annotated[float, typer.Option(min=0, help="Of a GPU, for each of them")] = 0,
    requests: Annotated[int, typer.Option(min=4)] = 512,
    in_flight: Annotated[int, typer.Option(min=1)] = 64,
    tokens: Annotated[list[int], typer.Option(min=1, help="Of each answer; may be given several times")] = [64],
    ports: Annotated[int, typer.Option(help="Where the endpoint listens meanwhile; Chroma at the next one")] = 8192,
    to: Annotated[Path | None, typer.Option("--json", help="The same as JSON")] = None,
) -> None:
    """Measure all sides."""
    bypass_proxies()
    os.environ.update(RAY_ENVIRONMENT)
    # All requests in flight may come at once, before any is given to a replica.
    bounds = f"max_ongoing_requests: {4 * in_flight}, max_queued_requests: {4 * in_flight}"
    generator = f"min_replicas: {replicas}, max_replicas: {replicas}, gpus: {gpus}, {bounds}"
    gateway = f"min_replicas: {gateways}, max_replicas: {gateways}, {bounds}"
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        base = make_fleet(state, adapters, rank)
        settings = load_settings(
            None,
            [
                f"serving.port={ports}",
                f"serving.generator={{{generator}}}",
                f"serving.gateway={{{gateway}}}",
                f"serving.retriever={{{bounds}}}",
                f"serving.weigher={{{bounds}}}",
                f"generation.waiting={4 * in_flight}",
                f"generation.rows={in_flight}",
                f"models.base={base}",
                f"index.url=http://127.0.0.1:{ports + 1}",
            ],
            state=state,
        )
        server.start(settings)
        ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        try:
            fill_index(settings, adapters)
            sides, workloads = over_http(settings, requests, tokens, in_flight)
            serve.shutdown()
        finally:
            ray.shutdown()
            server.stop(settings)
        alone = without_http(settings, workloads, in_flight, 1, gpus * replicas or 1.0)
        split = without_http(settings, workloads, in_flight, replicas, gpus or 1.0) if replicas > 1 else []
    sides = [*sides, *alone, *split]
    application = {side.tokens: side.tokens_per_second for side in sides if side.name == sides[0].name}
    table = [
        (
            side.tokens,
            side.name,
            side.requests,
            side.seconds,
            side.requests / side.seconds,
            side.tokens_per_second,
            application[side.tokens] / side.tokens_per_second,
        )
        for side in sorted(sides, key=lambda side: side.tokens)
    ]
    title = f"{gateways} gateways, {replicas} generators, {in_flight} in flight, {adapters} adapters of rank {rank}"
    columns = ("tokens", "side", "requests", "s", "requests/s", "output tokens/s", "application / this")
    tell(title, columns, table, {"title": title, "sides": [asdict(side) for side in sides]}, to)


if __name__ == "__main__":
    typer.run(main)
