"""The products of a model's linear layers, with a different composition for every row, against the base layers alone.

    python -m benchmarks.compose                                     the settings' base model
    python -m benchmarks.compose --model 7b --adapters 22 --rank 64  shapes of Llama 2 7B (a GPU)

Nothing but the layers' products runs: no attention, no norms. A line is a batch: so many tokens, so many adapters of the
pool in use, so many a row. All sides run in one process, on a GPU as one CUDA graph each: the model's layers as they were
loaded ("plain"), the same as the engine computes them without adapters ("base": layers with one input are one product), and
with adapters. "limit" is what the hardware allows: the bytes that must be read at the speed of a copy, or the operations at
the speed of a large product, whichever takes longer, for composed over base. What PEFT takes to merge one such composition
stands beside it.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from benchmarks.fleet import load, random_adapters, random_compositions, synchronise, with_peft
from benchmarks.report import tell
from lorafleet.composition import Adapter, ComposedModel, Lease, Run
from lorafleet.composition.groups import LayerGroup, layer_groups

console = Console(stderr=True)
SIDES = 9


@dataclass(frozen=True)
class Machine:
    """What the hardware does at best: bytes and operations in a second."""

    bytes: float
    operations: float


@dataclass(frozen=True)
class Line:
    """One batch; times in milliseconds. `limit` is what the hardware allows for composed over base."""

    kind: str
    tokens: int
    method: str
    in_use: int
    plain_ms: float
    base_ms: float
    composed_ms: float
    limit: float


def main(
    model: Annotated[str, typer.Option(help="7b (shapes of Llama 2 7B, random weights), base, or a reference")] = "base",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    adapters: Annotated[int, typer.Option(help="adapters in the pool")] = 22,
    rank: Annotated[int, typer.Option(help="their rank")] = 16,
    each: Annotated[int, typer.Option(help="adapters of a row")] = 4,
    rows: Annotated[str, typer.Option(help="rows of the batches that decode")] = "1,4,16,32,128,256",
    prompts: Annotated[int, typer.Option(help="tokens of the batch of prompts; 0 for none")] = 2048,
    methods: Annotated[str, typer.Option(help="of the compositions")] = "linear,cat",
    peft: Annotated[bool, typer.Option(help="measure what PEFT takes to merge one composition")] = True,
    to: Annotated[Path | None, typer.Option("--json", help="write what was measured to this file")] = None,
) -> None:
    """Measure every batch and print a table."""
    draws = random.Random(0)
    base, _ = load(model, dtype)
    fleet = random_adapters(base, adapters, rank)
    machine = _machine(base.device, base.dtype)
    merging = _merging(base, fleet, each, methods.split(","), draws) if peft else {}
    plain = _plain(base, [*map(int, rows.split(",")), *([prompts] if prompts else [])])
    composed = ComposedModel(base, pages=adapters, page_rank=rank)
    for adapter in fleet:
        composed.pool.add(adapter)
    lines = []
    with torch.inference_mode():
        for method in methods.split(","):
            for count in map(int, rows.split(",")):
                lines.append(
                    _measure(
                        composed,
                        _leases(composed, fleet, count, each, method, draws),
                        [1] * count,
                        machine,
                        method,
                        plain[count],
                    )
                )
            if prompts:
                leases = _leases(composed, fleet, SIDES, each, method, draws)
                lengths = _lengths(prompts, SIDES, draws)
                lines.append(_measure(composed, leases, lengths, machine, method, plain[prompts]))
    title = f"{model}, {adapters} adapters of rank {rank}, {each} a row, {base.dtype}".replace("torch.", "")
    table = [
        (
            line.kind,
            line.tokens,
            line.method,
            line.in_use,
            line.plain_ms,
            line.base_ms,
            line.composed_ms,
            f"{line.composed_ms / line.plain_ms:.2f}x",
            f"{line.composed_ms / line.base_ms:.2f}x",
            f"{line.limit:.2f}x",
            f"{merging[line.method]:,.0f}" if merging else "",
        )
        for line in lines
    ]
    columns = (
        "batch",
        "tokens",
        "method",
        "adapters in use",
        "plain ms",
        "base ms",
        "composed ms",
        "over plain",
        "over base",
        "limit",
        "PEFT merges in ms",
    )
    measured = {"title": title, "machine": asdict(machine), "merging_ms": merging, "lines": [asdict(line) for line in lines]}
    tell(title, columns, table, measured, to)


def _leases(
    composed: ComposedModel, fleet: Sequence[Adapter], count: int, each: int, method: str, draws: random.Random
) -> list[Lease]:
    leases = []
    for composition in random_compositions(fleet, count, each, method, draws):
        lease = composed.pool.lease(composed.pool.recipe(composition))
        assert lease is not None, "the pool has a page for every adapter"
        leases.append(lease)
    return leases


def _lengths(total: int, count: int, draws: random.Random) -> list[int]:
    """So many lengths, all different, with this sum."""
    cuts = sorted(draws.sample(range(1, total), count - 1))
    return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]


def _measure(
    composed: ComposedModel,
    leases: Sequence[Lease],
    lengths: Sequence[int],
    machine: Machine,
    method: str,
    plain_ms: float,
) -> Line:
    pages = composed.pool.pages
    tokens = sum(lengths)
    like = next(composed.model.parameters())
    products = _products(composed.model, pages.groups, tokens)
    plan = composed.plan([Run(lease, length) for lease, length in zip(leases, lengths, strict=True)])
    base_ms = _milliseconds(products, like.device)
    with composed.following(plan):
        composed_ms = _milliseconds(products, like.device)
    for lease in leases:
        composed.pool.release(lease)
    in_use = len({int(page) for lease in leases for page in lease.pages})
    size = sum(group.inputs * group.starts[-1] for group in pages.groups)
    share = sum(len(group.modules) * group.inputs + group.starts[-1] for group in pages.groups) * pages.rank
    a_row = sum(len(lease.pages) * length for lease, length in zip(leases, lengths, strict=True)) / tokens
    base_limit = max(size * like.itemsize / machine.bytes, 2 * tokens * size / machine.operations)
    composed_limit = max(
        (size + in_use * share) * like.itemsize / machine.bytes, 2 * tokens * (size + a_row * share) / machine.operations
    )
    kind = "decode" if max(lengths) == 1 else f"{len(lengths)} prompts"
    return Line(kind, tokens, method, in_use, plain_ms, base_ms, composed_ms, composed_limit / base_limit)


def _plain(model: nn.Module, counts: Sequence[int]) -> dict[int, float]:
    """The products of the layers as they were loaded, in milliseconds, for some numbers of tokens."""
    groups = layer_groups(model)
    device = next(model.parameters()).device
    with torch.inference_mode():
        return {count: _milliseconds(_products(model, groups, count), device) for count in counts}


def _products(model: nn.Module, groups: Sequence[LayerGroup], tokens: int) -> Callable[[], None]:
    """All layers of the groups, each group on one tensor."""
    like = next(model.parameters())
    layers = [[model.get_submodule(module) for module in group.modules] for group in groups]
    inputs = {
        features: torch.randn(1, tokens, features, device=like.device, dtype=like.dtype)
        for features in {group.inputs for group in groups}
    }

    def run() -> None:
        for group, members in zip(groups, layers, strict=True):
            x = inputs[group.inputs].view_as(inputs[group.inputs])
            for layer in members:
                layer(x)

    return run


def _milliseconds(run: Callable[[], None], device: torch.device, repeats: int = 7) -> float:
    """The median time of a run; on a GPU of a replayed graph."""
    if device.type == "cuda":
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run()
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    run()
    times = []
    for _ in range(repeats):
        synchronise()
        start = time.perf_counter()
        run()
        synchronise()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def _machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The speeds of a large copy and of a large product."""
    values = torch.randn(2**28 if device.type == "cuda" else 2**26, device=device).to(dtype)
    copy = torch.empty_like(values)
    moved = 2 * values.nbytes / _milliseconds(lambda: _ignore(copy.copy_(values)), device) * 1000
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return Machine(moved, 2 * side**3 / _milliseconds(lambda: _ignore(left @ right), device) * 1000)


def _merging(
    model: PreTrainedModel, fleet: Sequence[Adapter], each: int, methods: Sequence[str], draws: random.Random
) -> dict[str, float]:
    """What PEFT takes to merge one composition by each method, in milliseconds."""
    wrapped = with_peft(model, fleet)
    found = {}
    for method in methods:
        times = []
        for composition in random_compositions(fleet, 3, each, method, draws):
            synchronise()
            start = time.perf_counter()
            wrapped.add_weighted_adapter(
                list(composition.weights), list(composition.weights.values()), "merged", combination_type=method
            )
            synchronise()
            times.append(1000 * (time.perf_counter() - start))
            wrapped.delete_adapter("merged")
        found[method] = statistics.median(times)
    # The base layers as they were.
    wrapped.unload()
    return found


def _ignore(_: object) -> None:
    """A run's result is not looked at."""


if __name__ == "__main__":
    typer.run(main)
