"""Triton kernels that compute what every token's own composition of adapters adds, for linear layers that share an input.

Three launches, each with a grid that does not depend on what the table holds, so that a CUDA graph can capture them:
`_down` multiplies the tokens of each block with the A of every page the block reads, in parts along the inputs; `_mix` adds
the parts up in their order and applies the tokens' coefficients; `_up` multiplies with B and adds to the base layers'
outputs. No sum depends on the order in which programs run, nor on what other blocks hold.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafleet.composition.blocks import BlockTable
from lorafleet.errors import AdapterError

jit: Callable[[Callable[..., None]], Any] = triton.jit(
    do_not_specialize=("capacity", "blocks", "modules", "workers", "splits", "second", "third", "fourth")
)


@jit
def _down(
    x: tl.tensor,
    a: tl.tensor,
    u: tl.tensor,
    bounds: tl.tensor,
    starts: tl.tensor,
    pages: tl.tensor,
    capacity: tl.tensor,
    blocks: tl.tensor,
    workers: tl.tensor,
    modules: tl.tensor,
    splits: tl.tensor,
    inputs: tl.tensor,
    positions: tl.constexpr,
    rank: tl.constexpr,
    block: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
    even: tl.constexpr,
    early: tl.constexpr,
) -> None:
    # Programs of neighbouring numbers take the same place in different blocks: what they share of A stays in the cache.
    number = tl.program_id(0) % blocks
    worker = tl.program_id(0) // blocks
    if early:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    begin = tl.load(starts + number * positions)
    end = tl.load(starts + (number + 1) * positions)
    row = tl.arange(0, block)
    token = tl.load(bounds + number) + row
    there = token < tl.load(bounds + number + 1)
    together: tl.constexpr = columns // rank
    column = tl.arange(0, columns)
    tiles = tl.cdiv(inputs, depth)
    items = tl.cdiv(end - begin, together) * splits * modules
    for item in range(worker, items, workers):
        split = item % splits
        module = item // splits % modules
        entry = begin + item // (splits * modules) * together + column // rank
        ranks = column % rank
        page = tl.cast(tl.load(pages + tl.minimum(entry, end - 1)), tl.int64)
        first = split * tiles // splits
        last = (split + 1) * tiles // splits
        k = first * depth + tl.arange(0, depth)
        x_at = x + tl.cast(token, tl.int64)[:, None] * inputs + k[None, :]
        a_at = a + ((page * modules + module) * rank + ranks)[None, :] * inputs + k[:, None]
        total = tl.zeros([block, columns], dtype=tl.float32)
        for tile in range(first, last):
            if even:
                x_tile = tl.load(x_at, mask=there[:, None], other=0.0)
                a_tile = tl.load(a_at)
            else:
                inside = tl.arange(0, depth) < inputs - tile * depth
                x_tile = tl.load(x_at, mask=there[:, None] & inside[None, :], other=0.0)
                a_tile = tl.load(a_at, mask=inside[:, None], other=0.0)
            total = tl.dot(x_tile, a_tile, total, input_precision="tf32x3")
            x_at += depth
            a_at += depth
        place = (tl.cast(split, tl.int64) * capacity + entry) * modules + module
        u_at = u + (place[None, :] * block + row[:, None]) * rank + ranks[None, :]
        tl.store(u_at, total, mask=there[:, None] & (entry < end)[None, :])


@jit
def _mix(
    u: tl.tensor,
    z: tl.tensor,
    bounds: tl.tensor,
    starts: tl.tensor,
    sums: tl.tensor,
    direct: tl.tensor,
    gather: tl.tensor,
    spread: tl.tensor,
    capacity: tl.tensor,
    modules: tl.tensor,
    positions: tl.constexpr,
    rank: tl.constexpr,
    block: tl.constexpr,
    rows: tl.constexpr,
    entries: tl.constexpr,
    cuts: tl.constexpr,
    early: tl.constexpr,
) -> None:
    module = tl.program_id(1)
    number = tl.program_id(0) * rows // block
    row = tl.program_id(0) * rows % block + tl.arange(0, rows)[:, None]
    if early:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    begin = tl.load(starts + number * positions + tl.program_id(2))
    end = tl.load(starts + number * positions + tl.program_id(2) + 1)
    there = tl.load(bounds + number) + row < tl.load(bounds + number + 1)
    gathers = tl.load(sums + number) != 0
    k = tl.arange(0, rank)
    stride = tl.cast(capacity, tl.int64) * modules * block * rank
    gathered = tl.zeros([rows, rank], dtype=tl.float32)
    if gathers:
        for first in range(begin, end, entries):
            entry = first + tl.arange(0, entries)[None, :]
            used = there & (entry < end)
            at = (((tl.cast(entry, tl.int64) * modules + module) * block + row) * rank)[:, :, None] + k[None, None, :]
            share = tl.load(gather + entry * block + row, mask=used, other=0.0)
            # Of the entries of a block a token uses few: what it does not take is not read.
            taken = (share != 0)[:, :, None]
            ranks = tl.load(u + at, mask=taken, other=0.0)
            for cut in tl.static_range(1, cuts):
                ranks += tl.load(u + cut * stride + at, mask=taken, other=0.0)
            gathered += tl.sum(share[:, :, None] * ranks, axis=1)
    for first in range(begin, end, entries):
        entry = first + tl.arange(0, entries)[None, :]
        used = there & (entry < end)
        at = (((tl.cast(entry, tl.int64) * modules + module) * block + row) * rank)[:, :, None] + k[None, None, :]
        share = tl.load(direct + entry * block + row, mask=used, other=0.0)
        taken = (share != 0)[:, :, None]
        ranks = tl.load(u + at, mask=taken, other=0.0)
        for cut in tl.static_range(1, cuts):
            ranks += tl.load(u + cut * stride + at, mask=taken, other=0.0)
        mixed = share[:, :, None] * ranks
        if gathers:
            mixed += tl.load(spread + entry * block + row, mask=used, other=0.0)[:, :, None] * gathered[:, None, :]
        tl.store(z + at, mixed.to(z.dtype.element_ty), mask=used[:, :, None])


@jit
def _up(
    y: tl.tensor,
    z: tl.tensor,
    b: tl.tensor,
    bounds: tl.tensor,
    starts: tl.tensor,
    pages: tl.tensor,
    blocks: tl.tensor,
    modules: tl.tensor,
    second: tl.tensor,
    third: tl.tensor,
    fourth: tl.tensor,
    outputs: tl.tensor,
    positions: tl.constexpr,
    rank: tl.constexpr,
    block: tl.constexpr,
    width: tl.constexpr,
    together: tl.constexpr,
    early: tl.constexpr,
) -> None:
    number = tl.program_id(0) % blocks
    first_column = tl.program_id(0) // blocks * width
    module = tl.cast(first_column >= second, tl.int32)
    module += tl.cast(first_column >= third, tl.int32) + tl.cast(first_column >= fourth, tl.int32)
    column = first_column + tl.arange(0, width)
    row = tl.arange(0, block)
    k = tl.arange(0, together * rank)
    if early:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    begin = tl.load(starts + number * positions)
    end = tl.load(starts + (number + 1) * positions)
    token = tl.load(bounds + number) + row
    there = token < tl.load(bounds + number + 1)
    y_at = y + tl.cast(token, tl.int64)[:, None] * outputs + column[None, :]
    # A small tile is on its way while the products run; a large one would take the registers of a second program.
    if block <= 32:
        y_tile = tl.load(y_at, mask=there[:, None], other=0.0)
    total = tl.zeros([block, width], dtype=tl.float32)
    for first in range(begin, end, together):
        if together == 1:
            page = tl.cast(tl.load(pages + first), tl.int64)
            z_at = ((tl.cast(first, tl.int64) * modules + module) * block + row)[:, None] * rank + k[None, :]
            z_tile = tl.load(z + z_at)
            b_tile = tl.load(b + (page * rank + k)[:, None] * outputs + column[None, :])
        else:
            entry = first + k // rank
            page = tl.cast(tl.load(pages + tl.minimum(entry, end - 1)), tl.int64)
            z_at = (((tl.cast(entry, tl.int64) * modules + module) * block)[None, :] + row[:, None]) * rank + (k % rank)[
                None, :
            ]
            z_tile = tl.load(z + z_at, mask=(entry < end)[None, :], other=0.0)
            b_tile = tl.load(b + (page * rank + k % rank)[:, None] * outputs + column[None, :])
        total = tl.dot(z_tile, b_tile, total, input_precision="tf32x3")
    if end > begin:
        if block > 32:
            y_tile = tl.load(y_at, mask=there[:, None], other=0.0)
        tl.store(y_at, (total + y_tile.to(tl.float32)).to(y.dtype.element_ty), mask=there[:, None])


def add_composed_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, table: BlockTable, outputs: tuple[int, ...]) -> None:
    """Add to the base layers' outputs what every token's composition adds, in place.

    While few tokens are decoded, `composed_ranks` on a side stream, beside the base layers' own product, and `add_ranks_`
    when both are done is faster.

    Args:
        y: [tokens, outputs of all layers], what the base layers give; bfloat16, float16 or float32, contiguous, as are all.
        x: [tokens, inputs], in the dtype of y.
        a: [pages, layers * rank, inputs], in the dtype of y; the layers' A one under the other, their scale folded in.
        b: [pages, rank, outputs of all layers], in the dtype of y; the layers' B transposed, side by side.
        table: which pages the tokens read.
        outputs: features of each layer's output.

    Raises:
        AdapterError: a page does not have 16, 32 or 64 ranks, or the layers' sizes are not multiples of 16.
    """
    add_ranks_(y, composed_ranks(x, a, table, len(outputs)), b, table, outputs)


def composed_ranks(x: Tensor, a: Tensor, table: BlockTable, modules: int) -> Tensor:
    """The tokens times A of the pages that they read, with their coefficients applied; does not read the base's outputs.

    Args:
        x, a, table: as in `add_composed_`.
        modules: how many layers share x.

    Returns:
        [capacity, modules, block, rank], in x's dtype, for `add_ranks_`; rows that hold no token are undefined.

    Raises:
        AdapterError: as in `add_composed_`.
    """
    inputs, rank = x.shape[1], a.shape[1] // modules
    _check(rank, modules, inputs)
    shape = _down_shape(x.shape[0], table.block, table.blocks, modules, x.device)
    u = torch.empty((shape.splits, table.capacity, modules, table.block, rank), dtype=torch.float32, device=x.device)
    # Programs beyond the items that there are end at once; where there are more items, programs take several.
    items = triton.cdiv(triton.cdiv(table.capacity, table.blocks), shape.columns // rank) * modules * shape.splits
    workers = min(items, max(2 * _processors(x.device) // table.blocks, 2 * modules * shape.splits))
    # As many bytes of the inputs in a tile, whatever the format.
    depth = shape.depth * 2 // x.element_size()
    early = _launches_early(x.device)
    _down[(table.blocks * workers,)](
        x,
        a,
        u,
        table.bounds,
        table.starts,
        table.entry_page,
        table.capacity,
        table.blocks,
        workers,
        modules,
        shape.splits,
        inputs,
        positions=table.positions,
        rank=rank,
        block=table.block,
        columns=shape.columns,
        depth=depth,
        even=inputs % depth == 0,
        early=early,
        num_warps=shape.warps,
        num_stages=_stages(shape.stages, (table.block + shape.columns) * shape.depth * 2, x.device),
        launch_pdl=early,
    )
    z = torch.empty(u.shape[1:], dtype=x.dtype, device=x.device)
    mix = _mix_shape(x.shape[0], table.blocks)
    _mix[(table.blocks * table.block // mix.rows, modules, table.positions)](
        u,
        z,
        table.bounds,
        table.starts,
        table.sums,
        table.direct,
        table.gather,
        table.spread,
        table.capacity,
        modules,
        positions=table.positions,
        rank=rank,
        block=table.block,
        rows=mix.rows,
        entries=mix.entries,
        cuts=shape.splits,
        early=early,
        num_warps=mix.warps,
        launch_pdl=early,
    )
    return z


def add_ranks_(y: Tensor, z: Tensor, b: Tensor, table: BlockTable, outputs: tuple[int, ...]) -> None:
    """Add what `composed_ranks` gave, times B, to the base layers' outputs, in place.

    Args:
        y, b, table, outputs: as in `add_composed_`.
        z: from `composed_ranks`, with the same table.

    Raises:
        AdapterError: as in `add_composed_`.
    """
    total, rank = y.shape[1], b.shape[1]
    _check(rank, len(outputs), *outputs)
    shape = _up_shape(table.block, table.blocks, total)
    common = math.gcd(*outputs)
    width = min(shape.width, common & -common)
    starts = [sum(outputs[:place]) if place < len(outputs) else total for place in range(1, 4)]
    early = _launches_early(y.device)
    _up[(table.blocks * (total // width),)](
        y,
        z,
        b,
        table.bounds,
        table.starts,
        table.entry_page,
        table.blocks,
        len(outputs),
        *starts,
        total,
        positions=table.positions,
        rank=rank,
        block=table.block,
        width=width,
        together=64 // rank,
        early=early,
        num_warps=shape.warps,
        num_stages=shape.stages,
        launch_pdl=early,
    )


@dataclass(frozen=True)
class _DownShape:
    """How `_down` cuts its work: columns (ranks of several pages) and inputs of a tile, parts along the inputs."""

    columns: int
    depth: int
    splits: int
    warps: int
    stages: int


@dataclass(frozen=True)
class _MixShape:
    """How `_mix` cuts its work: tokens of a program, and entries that it loads at once."""

    rows: int
    entries: int
    warps: int


@dataclass(frozen=True)
class _UpShape:
    """How `_up` cuts its work: outputs of a tile."""

    width: int
    warps: int
    stages: int


# What was fastest of some twenty shapes for each launch, measured on an H100 with 7B layers and 22 adapters of rank 64.


def _down_shape(tokens: int, block: int, blocks: int, modules: int, device: torch.device) -> _DownShape:
    if block <= 32:
        return _DownShape(64, 128, 16 if tokens <= 2 else 4 if modules > 1 else 8, 4, 4 if block == 32 else 3)
    if blocks <= 4:
        return _DownShape(128, 64, max(2, 5 - modules), 4 if block == 64 else 8, 4)
    # A tile takes the whole composition of a prompt; parts so that the last round of programs leaves few processors idle.
    splits = min(range(1, 5), key=lambda parts: (triton.cdiv(blocks * modules * parts, _processors(device)) / parts, parts))
    return _DownShape(256, 64, splits, 8, 4)


def _mix_shape(tokens: int, blocks: int) -> _MixShape:
    if blocks > 4:
        return _MixShape(2, 8, 1)
    return _MixShape(1, 8, 1) if tokens <= 2 else _MixShape(1, 32, 4)


def _up_shape(block: int, blocks: int, outputs: int) -> _UpShape:
    if block >= 64:
        if blocks > 4:
            return _UpShape(128, 4, 5)
        return _UpShape(64, 4, 7 if blocks * outputs <= 16384 else 5)
    if outputs <= 8192:
        return _UpShape(32, 4, 9)
    return _UpShape(64, 4, 9 if outputs <= 16384 else 5)


def _stages(wanted: int, tile: int, device: torch.device) -> int:
    """So many tiles in flight, or what the shared memory of a processor holds (a tile in bytes)."""
    return min(wanted, max(2, _shared_memory(device) // tile))


@cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 17
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"])


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 8


@cache
def _launches_early(device: torch.device) -> bool:
    """Whether a launch may begin before the one before it has ended (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def _check(rank: int, modules: int, *sizes: int) -> None:
    if rank not in (16, 32, 64):
        raise AdapterError(f"the ranks of a page are {rank}", "Allowed: 16, 32 or 64")
    if modules > 4:
        raise AdapterError(f"{modules} layers share an input", "The kernels take at most 4 together")
    for size in sizes:
        if size % 16:
            raise AdapterError(f"a layer has {size} inputs or outputs", "The kernels take multiples of 16")
