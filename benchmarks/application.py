"""The whole application over HTTP against the bare engine in one process: same requests, same compositions.

    python -m benchmarks.application --replicas 2 --gpus 0.45 --rank 64 --in-flight 64

The fleet is made for it: the settings' base model with an end token that it never writes, so that every answer has its full
length, random adapters, and an index of random rows. First the application, gateway, retriever, weigher and as many
generators as said, driven over HTTP with so many requests in flight; half of the requests name their weights, half leave
them to retrieval. Then, when all replicas are gone, one engine answers the same prompts under the compositions that were
found.
"""

import asyncio
import json
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import ray
import torch
import typer
from ray import serve
from safetensors.torch import save_file

from benchmarks.fleet import MODULES, WORDS, random_adapters
from benchmarks.report import tell
from lorafleet.cli.service import RAY_ENVIRONMENT
from lorafleet.composition import Composition
from lorafleet.composition.files import CONFIG_FILE, WEIGHTS_FILE
from lorafleet.config import Models, Settings, load_settings
from lorafleet.engine import GenerationRequest
from lorafleet.fleet import Fleet
from lorafleet.models import load_base_model, load_tokenizer
from lorafleet.retrieval import Encoder, Entry, open_for_writing, row_identifiers, server
from lorafleet.tasks import prompt_version
from serve.deploy import deploy

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
class Side:
    """One side: how long all requests took, and how many tokens were read and written."""

    name: str
    requests: int
    seconds: float
    prompt_tokens: int
    output_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Output tokens."""
        return self.output_tokens / self.seconds


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
        folder = state / "adapters" / adapter.name
        folder.mkdir(parents=True)
        halves = {
            f"base_model.model.{module}.lora_{half}.weight": weight.to(torch.bfloat16).contiguous()
            for module, layer in adapter.layers.items()
            for half, weight in (("A", layer.a), ("B", layer.b))
        }
        save_file(halves, folder / WEIGHTS_FILE)
        described = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": MODULES}
        (folder / CONFIG_FILE).write_text(json.dumps(described), encoding="utf-8")
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


def over_http(
    settings: Settings, count: int, tokens: int, in_flight: int
) -> tuple[Side, list[dict[str, Any]], list[dict[str, Any]]]:
    """The application's side, with the requests and what composed each answer."""
    url = deploy(settings)
    listed = httpx.get(f"{url}/v1/models").json()["data"]
    adapters = [model["task"] for model in listed if model.get("task")]
    asked = bodies(adapters, count, tokens)
    # Everything is warm before it is timed: every replica has met adapters, prompts and batches.
    asyncio.run(drive(url, asked[: 2 * in_flight], in_flight))
    seconds, answers = asyncio.run(drive(url, asked, in_flight))
    used = [answer["usage"] for answer in answers]
    side = Side(
        "application over HTTP",
        count,
        seconds,
        sum(one["prompt_tokens"] for one in used),
        sum(one["completion_tokens"] for one in used),
    )
    return side, asked, [answer["composition"] for answer in answers]


def bare(settings: Settings, asked: Sequence[Mapping[str, Any]], composed: Sequence[Mapping[str, Any]], rows: int) -> Side:
    """The engine's side."""
    generation = settings.generation.model_copy(update={"rows": rows})
    engine = Fleet(settings.model_copy(update={"generation": generation})).engine
    engine.warm_up()
    requests = [
        GenerationRequest(
            body["prompt"], Composition(one["method"], one["weights"], settings.composing.density), body["max_tokens"]
        )
        for body, one in zip(asked, composed, strict=True)
    ]
    engine.generate(requests[: 2 * rows])
    start = time.perf_counter()
    answers = engine.generate(requests)
    seconds = time.perf_counter() - start
    read, written = sum(answer.prompt_tokens for answer in answers), sum(len(answer.choices) for answer in answers)
    engine.close()
    return Side("engine alone", len(answers), seconds, read, written)


def main(
    adapters: Annotated[int, typer.Option(min=2)] = 22,
    rank: Annotated[int, typer.Option(min=1)] = 16,
    replicas: Annotated[int, typer.Option(min=1, help="Generators")] = 2,
    gpus: Annotated[float, typer.Option(min=0, help="Of a GPU, for each of them")] = 0,
    requests: Annotated[int, typer.Option(min=4)] = 512,
    in_flight: Annotated[int, typer.Option(min=1)] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Of each answer")] = 64,
    ports: Annotated[int, typer.Option(help="Where the endpoint listens meanwhile; Chroma at the next one")] = 8192,
    to: Annotated[Path | None, typer.Option("--json", help="The same as JSON")] = None,
) -> None:
    """Measure both sides."""
    os.environ.update(RAY_ENVIRONMENT)
    generator = f"min_replicas: {replicas}, max_replicas: {replicas}, gpus: {gpus}, max_ongoing_requests: 400"
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        base = make_fleet(state, adapters, rank)
        settings = load_settings(
            None,
            [
                f"serving.port={ports}",
                f"serving.generator={{{generator}}}",
                "serving.gateway={max_ongoing_requests: 400}",
                f"generation.rows={-(-in_flight // replicas)}",
                f"models.base={base}",
                f"index.url=http://127.0.0.1:{ports + 1}",
            ],
            state=state,
        )
        server.start(settings)
        ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        try:
            fill_index(settings, adapters)
            http, asked, composed = over_http(settings, requests, tokens, in_flight)
            serve.shutdown()
        finally:
            ray.shutdown()
            server.stop(settings)
        alone = bare(settings, asked, composed, in_flight)
    table = [
        (side.name, side.requests, side.seconds, side.requests / side.seconds, side.tokens_per_second, side.output_tokens)
        for side in (http, alone)
    ]
    ratio = http.tokens_per_second / alone.tokens_per_second
    title = f"{replicas} generators, {in_flight} in flight: {ratio:.2f} of the engine alone"
    columns = ("side", "requests", "s", "requests/s", "output tokens/s", "output tokens")
    tell(title, columns, table, {"title": title, "ratio": ratio, "sides": [asdict(http), asdict(alone)]}, to)


if __name__ == "__main__":
    typer.run(main)
