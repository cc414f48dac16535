"""Measure the engine on a GPU by passes, by the time between them, and by kernels.

    python -m benchmarks.profile --model 7b --adapters 22 --rank 64 --requests 512 --rows 256

The requests are those of benchmarks.serve_batch. They are answered twice: once with CUDA events around every pass, and once
under torch's profiler. Times are of the GPU; "between passes" is what is left of the wall clock.
"""

import json
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from benchmarks.fleet import load, random_adapters, random_compositions, random_prompts
from benchmarks.report import tell
from lorafleet.composition import BASE, Composition
from lorafleet.composition.pages import page_rank_for
from lorafleet.engine import Engine, GenerationRequest

GROUPS = {
    "adapters, A": ("_down",),
    "adapters, coefficients": ("_mix",),
    "adapters, B": ("_up",),
    "attention": ("_attend", "_join", "_store"),
    "base products": ("gemm", "nvjet", "cutlass", "cublas", "splitk"),
    "norms, rotations, activations": ("_norm", "_rotate", "_gate", "triton_", "_fused"),
}


@dataclass
class Passes:
    """Passes of one kind.

    Attributes:
        tokens: of each pass.
        events: CUDA events before and behind each.
    """

    tokens: list[int] = field(default_factory=list)
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """On the GPU, of all."""
        return sum(begin.elapsed_time(end) for begin, end in self.events) / 1000


def main(
    model: Annotated[str, typer.Option(help="7b (shapes of Llama 2 7B, random weights), base, or a reference")] = "7b",
    adapters: Annotated[int, typer.Option(help="adapters in the pool")] = 22,
    rank: Annotated[int, typer.Option(help="their rank")] = 64,
    each: Annotated[int, typer.Option(help="adapters of a composition; 0 for the base model")] = 4,
    requests: Annotated[int, typer.Option(help="how many")] = 512,
    rows: Annotated[int, typer.Option(help="in flight at once")] = 256,
    new: Annotated[int, typer.Option(help="new tokens of each request")] = 64,
    prefill: Annotated[list[int], typer.Option(help="tokens of a pass over prompts; several are measured in turn")] = [2048],
    to: Annotated[Path | None, typer.Option("--json", help="write what was measured to this file")] = None,
) -> None:
    """Measure, and print a table of passes and one of kernels."""
    draws = random.Random(0)
    base, tokenizer = load(model, "auto")
    fleet = random_adapters(base, adapters, rank)
    prompts = random_prompts(tokenizer, requests, 40, 400, draws)
    chosen = random_compositions(fleet, requests, each, "linear", draws) if each else [BASE] * requests
    asked = [GenerationRequest(prompt, one, max_tokens=new) for prompt, one in zip(prompts, chosen, strict=True)]
    page_rank = page_rank_for([rank])
    measured: dict[str, Any] = {}
    engine = Engine(
        base,
        tokenizer,
        rows=rows,
        longest=4096,
        prefill_tokens=max(prefill),
        pages=adapters * math.ceil(rank / page_rank),
        page_rank=page_rank,
    )
    for adapter in fleet:
        engine.pool.add(adapter)
    engine.warm_up()
    engine.generate([GenerationRequest("warm", Composition("cat", {fleet[0].name: 1.0}), max_tokens=2)])
    for tokens in prefill:
        engine._loop._prefill_tokens = tokens
        engine.generate(asked)
        passes, seconds = _passes(engine, asked)
        table = [
            (kind, len(one.tokens), sum(one.tokens), one.seconds, 1000 * one.seconds / max(len(one.tokens), 1))
            for kind, one in passes.items()
        ]
        rest = seconds - sum(one.seconds for one in passes.values())
        table += [("between passes", "", "", rest, ""), ("all", "", requests * new, seconds, "")]
        title = f"{model}, {each} of {adapters} adapters of rank {rank}, {rows} rows, passes of {tokens} tokens"
        measured[f"passes of {tokens}"] = table
        tell(title, ("", "passes", "tokens", "s", "ms a pass"), table, {}, None)
    kernels = _kernels(lambda: engine.generate(asked))
    measured["kernels"] = kernels
    tell("kernels", ("", "launches", "s"), kernels, {}, None)
    if to is not None:
        to.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    engine.close()


def _passes(engine: Engine, asked: Sequence[GenerationRequest]) -> tuple[dict[str, Passes], float]:
    """The passes of one run, and its seconds."""
    runner, found = engine._runner, {"prompts": Passes(), "decoding": Passes()}
    plain = {"prompts": runner.prefill, "decoding": runner.decode}

    def timed(kind: str) -> Callable[..., torch.Tensor]:
        def run(items: Sequence[Any], *others: Any) -> torch.Tensor:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            logits: torch.Tensor = plain[kind](items, *others)
            end.record()
            found[kind].events.append((begin, end))
            found[kind].tokens.append(sum(len(one.tokens) for one in items) if kind == "prompts" else len(items))
            return logits

        return run

    runner.prefill, runner.decode = timed("prompts"), timed("decoding")  # type: ignore[method-assign]
    try:
        torch.cuda.synchronize()
        start = time.perf_counter()
        engine.generate(asked)
        torch.cuda.synchronize()
        return found, time.perf_counter() - start
    finally:
        runner.prefill, runner.decode = plain["prompts"], plain["decoding"]  # type: ignore[method-assign]


def _kernels(run: Callable[[], object]) -> list[tuple[str, int, float]]:
    """GPU time by groups of kernels, the largest first, and the largest of what is in no group by name."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        run()
        torch.cuda.synchronize()
    seconds: dict[str, float] = defaultdict(float)
    launches: Counter[str] = Counter()
    for event in profiler.key_averages():
        group = next((name for name, marks in GROUPS.items() if any(mark in event.key for mark in marks)), event.key[:60])
        seconds[group] += event.self_device_time_total / 1e6
        launches[group] += event.count
    largest = sorted(seconds, key=lambda name: -seconds[name])[:24]
    return [(name, launches[name], seconds[name]) for name in largest if seconds[name]]


if __name__ == "__main__":
    typer.run(main)
