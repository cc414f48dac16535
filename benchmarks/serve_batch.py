"""Requests of different compositions through the engine, against what a user would pick instead.

    python -m benchmarks.serve_batch                       the settings' base model, adapters of rank 16
    python -m benchmarks.serve_batch --model 7b --adapters 22 --rank 64 --requests 512 --rows 256   (one large GPU)
    python -m benchmarks.serve_batch --adapters 1000 --rank 8 --requests 512 --rows 64 --files --padded 0 --merged 0

All sides answer the same prompts with the same number of new tokens, in one run: the engine with another composition for
every request; the engine without adapters; transformers' `generate` on padded batches without adapters; and PEFT, which
merges the adapters anew for every request (measured on a few of them) and answers one request at a time.
"""

import gc
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.fleet import (
    load,
    random_adapters,
    random_compositions,
    random_prompts,
    synchronise,
    with_peft,
    write_adapter,
)
from benchmarks.report import tell
from lorafleet.composition import BASE, Adapter, Composition, load_adapter
from lorafleet.composition.pages import page_rank_for
from lorafleet.engine import Engine, GenerationRequest

console = Console(stderr=True)
MIB = 2**20


@dataclass(frozen=True)
class Measured:
    """One side.

    Attributes:
        before_first_ms: what a composition that was never seen before costs before its first token can be computed.
        loading_seconds: what it took to bring all adapters in, from memory or from files.
        adapters_mib: what they take on the device.
        latency_ms: half of the requests took no longer, from the first computation for them to their end.
        latency_p95_ms: nor 95 of 100 than this.
    """

    side: str
    requests: int
    seconds: float
    output_tokens: int
    before_first_ms: float | None = None
    loading_seconds: float | None = None
    adapters_mib: float | None = None
    latency_ms: float | None = None
    latency_p95_ms: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Output tokens."""
        return self.output_tokens / self.seconds


def main(
    model: Annotated[str, typer.Option(help="7b (shapes of Llama 2 7B, random weights), base, or a reference")] = "base",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    adapters: Annotated[int, typer.Option(help="adapters in the pool")] = 22,
    rank: Annotated[int, typer.Option(help="their rank")] = 16,
    each: Annotated[int, typer.Option(help="adapters of a composition")] = 4,
    method: Annotated[str, typer.Option(help="of the compositions; mixed for linear and cat in turn")] = "linear",
    requests: Annotated[int, typer.Option(help="how many")] = 16,
    rows: Annotated[int, typer.Option(help="in flight at once")] = 16,
    shortest: Annotated[int, typer.Option(help="tokens of the shortest prompt")] = 40,
    longest: Annotated[int, typer.Option(help="and of the longest")] = 400,
    new: Annotated[int, typer.Option(help="new tokens of each request")] = 64,
    padded: Annotated[int, typer.Option(help="batch of generate; 0 for none")] = 64,
    merged: Annotated[int, typer.Option(help="requests answered by merging with PEFT; 0 for none")] = 4,
    repeats: Annotated[int, typer.Option(help="of the engine's sides; the best counts")] = 2,
    files: Annotated[bool, typer.Option("--files", help="adapters come from files, as into a pool")] = False,
    to: Annotated[Path | None, typer.Option("--json", help="write what was measured to this file")] = None,
) -> None:
    """Measure all sides and print a table."""
    draws = random.Random(0)
    base, tokenizer = load(model, dtype)
    fleet = random_adapters(base, adapters, rank)
    prompts = random_prompts(tokenizer, requests, shortest, longest, draws)
    compositions = [
        composition
        for half in (("linear", "cat") if method == "mixed" else (method, method))
        for composition in random_compositions(fleet, (requests + 1) // 2, each, half, draws)
    ][:requests]
    sides = [
        *_padded(base, tokenizer, prompts, new, padded),
        *_merged(base, tokenizer, fleet, prompts, compositions, new, merged),
        # Last: the engine gives the model another attention, and layers that compute together.
        *_engine(base, tokenizer, fleet, prompts, compositions, new, rows, repeats, files),
    ]
    first = next(side for side in sides if side.side == COMPOSED).tokens_per_second
    table = [
        (
            side.side,
            side.requests,
            side.seconds,
            side.requests / side.seconds,
            side.tokens_per_second,
            first / side.tokens_per_second,
            *(
                "" if one is None else f"{one:,.2f}"
                for one in (
                    side.latency_ms,
                    side.latency_p95_ms,
                    side.before_first_ms,
                    side.loading_seconds,
                    side.adapters_mib,
                )
            ),
        )
        for side in sides
    ]
    title = (
        f"{model}, {adapters} adapters of rank {rank}, {each} a request ({method}), "
        f"prompts of {shortest} to {longest} tokens, {new} new, {rows} in flight"
    )
    columns = (
        "side",
        "requests",
        "s",
        "requests/s",
        "tokens/s",
        "composed / this",
        "ms, p50",
        "p95",
        "ms, new composition",
        "s, loading",
        "MiB",
    )
    tell(title, columns, table, {"title": title, "sides": [asdict(side) for side in sides]}, to)


COMPOSED = "engine, every request its own composition"


def _engine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    fleet: Sequence[Adapter],
    prompts: Sequence[str],
    compositions: Sequence[Composition],
    new: int,
    rows: int,
    repeats: int,
    files: bool,
) -> list[Measured]:
    # What the other sides held goes back before the engine takes what is free.
    gc.collect()
    torch.cuda.empty_cache()
    page_rank = page_rank_for([fleet[0].rank])
    engine = Engine(
        model,
        tokenizer,
        rows=rows,
        longest=4096,
        pages=len(fleet) * math.ceil(fleet[0].rank / page_rank),
        page_rank=page_rank,
    )
    loading = _load(engine, fleet, files)
    held = sum(one.a.nbytes + one.b.nbytes for one in engine.pool.pages.tensors if one is not None) / MIB
    engine.warm_up()
    engine.generate([GenerationRequest("warm", Composition("cat", {fleet[0].name: 1.0}), max_tokens=2)])

    def side(name: str, chosen: Sequence[Composition]) -> Measured:
        asked = [
            GenerationRequest(prompt, composition, max_tokens=new)
            for prompt, composition in zip(prompts, chosen, strict=True)
        ]
        latencies: list[float] = []
        seconds = _best(lambda: latencies.extend(_answer(engine, asked)), repeats, name)
        twentieths = statistics.quantiles(latencies, n=20)
        return Measured(
            name,
            len(asked),
            seconds,
            len(asked) * new,
            _leasing(engine, chosen),
            latency_ms=1000 * statistics.median(latencies),
            latency_p95_ms=1000 * twentieths[-1],
        )

    composed = replace(side(COMPOSED, compositions), loading_seconds=loading, adapters_mib=held)
    measured = [composed, side("the same engine without adapters", [BASE] * len(prompts))]
    engine.close()
    return measured


def _load(engine: Engine, fleet: Sequence[Adapter], files: bool) -> float:
    """Bring all adapters in; seconds."""
    with tempfile.TemporaryDirectory() as folder:
        places = {adapter.name: Path(folder) / adapter.name for adapter in fleet}
        if files:
            for adapter in fleet:
                write_adapter(adapter, places[adapter.name])
        began = time.perf_counter()
        for adapter in fleet:
            engine.pool.add(load_adapter(places[adapter.name], adapter.name) if files else adapter)
        # Every adapter is brought in once; a composition of them is then as new as any.
        for adapter in fleet:
            _lease(engine, Composition("cat", {adapter.name: 1.0}))
        synchronise()
        return time.perf_counter() - began


def _answer(engine: Engine, asked: Sequence[GenerationRequest]) -> list[float]:
    """Answer all requests; how long each took from the first computation for it, in seconds."""
    ended: SimpleQueue[tuple[int, float]] = SimpleQueue()
    begun, futures = [], []
    for number, request in enumerate(asked):
        begun.append(time.perf_counter())
        futures.append(engine.submit(request, patient=True))
        futures[-1].add_done_callback(lambda _, number=number: ended.put((number, time.perf_counter())))
    waited = [future.result().seconds_waiting for future in futures]
    # A future has its result a moment before it calls back.
    return [at - begun[number] - waited[number] for number, at in (ended.get() for _ in futures)]


def _leasing(engine: Engine, compositions: Sequence[Composition]) -> float | None:
    """What the engine does once for a composition, before it can compute a token of it, in milliseconds."""
    if not any(composition.weights for composition in compositions):
        return None
    times = []
    for composition in compositions:
        start = time.perf_counter()
        _lease(engine, composition)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def _lease(engine: Engine, composition: Composition) -> None:
    """Bring in what a composition needs, and let it go."""
    lease = engine.pool.lease(engine.pool.recipe(composition))
    assert lease is not None
    engine.pool.release(lease)


def _padded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new: int, batch: int
) -> list[Measured]:
    if not batch:
        return []
    tokenizer.padding_side = "left"

    def run() -> None:
        for start in range(0, len(prompts), batch):
            inputs = tokenizer(list(prompts[start : start + batch]), return_tensors="pt", padding=True).to(model.device)
            inputs.pop("token_type_ids", None)
            model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)

    name = f"transformers' generate, padded batches of {min(batch, len(prompts))}, no adapters"
    # The first call of a process is slow.
    model.generate(torch.ones(1, 8, dtype=torch.long, device=model.device), max_new_tokens=2, do_sample=False)
    return [Measured(name, len(prompts), _best(run, 1, name), len(prompts) * new)]


def _merged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    fleet: Sequence[Adapter],
    prompts: Sequence[str],
    compositions: Sequence[Composition],
    new: int,
    count: int,
) -> list[Measured]:
    if not count:
        return []
    wrapped = with_peft(model, fleet)
    merging: list[float] = []

    def run() -> None:
        for prompt, composition in zip(prompts[:count], compositions[:count], strict=True):
            start = time.perf_counter()
            wrapped.add_weighted_adapter(
                list(composition.weights), list(composition.weights.values()), "merged", combination_type=composition.method
            )
            wrapped.set_adapter("merged")
            synchronise()
            merging.append(time.perf_counter() - start)
            inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
            inputs.pop("token_type_ids", None)
            wrapped.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            wrapped.set_adapter(fleet[0].name)
            wrapped.delete_adapter("merged")

    name = "PEFT, merging for every request"
    seconds = _best(run, 1, name)
    # The base layers as they were.
    wrapped.unload()
    return [Measured(name, count, seconds, count * new, 1000 * sum(merging) / len(merging))]


def _best(run: Callable[[], object], repeats: int, name: str) -> float:
    times = []
    for _ in range(repeats):
        synchronise()
        start = time.perf_counter()
        with torch.inference_mode():
            run()
        synchronise()
        times.append(time.perf_counter() - start)
        console.print(f"{name}: {times[-1]:.2f} s", style="dim")
    return min(times)


if __name__ == "__main__":
    typer.run(main)
