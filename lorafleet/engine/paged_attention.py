"""Attention over keys and values that lie in pages: one kernel for prompts and for single new tokens, and one that stores.

A program takes the tokens of one query block and one head of the cache; the rows of its tile are its tokens, each with all
the query heads that share the cache's head. The softmax runs in one pass over the keys in float32, like FlashAttention-2's
(Dao, 2023). Where there are too few blocks to fill the GPU, the keys of a block are split over several programs, and a
second launch joins the parts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafleet.errors import ModelError

jit: Callable[[Callable[..., None]], Any] = triton.jit(do_not_specialize=("window", "table_stride", "k_stride", "v_stride"))

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class QueryBlocks:
    """The new tokens of a batch, cut into blocks of one row's tokens; all tensors int32, on the device.

    Attributes:
        rows: rows of a program's tile, tokens times query heads of a cache head (16, 32, 64 or 128); a block holds at most
            rows // (heads // cache heads) tokens, see `tokens_of`.
        row: [blocks], which row of the tables a block's tokens belong to.
        first: [blocks], where its first token lies among the packed tokens.
        count: [blocks], how many tokens it has; 0 for a block that is not in use.
        key: [blocks], the key index of its first token; those of the others follow.
    """

    rows: int
    row: Tensor
    first: Tensor
    count: Tensor
    key: Tensor


@dataclass(frozen=True)
class Branches:
    """Several answers behind one prompt, in one row: a token sees the keys before `shared` and those from `branch`.

    Attributes:
        shared: int32 [tokens], how many keys of the row all its answers see; 0 for a plain row.
        branch: int32 [tokens], the key index at which the token's own answer begins; 0 for a plain row.
    """

    shared: Tensor
    branch: Tensor


@jit
def _attend(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    weight: tl.tensor,
    tables: tl.tensor,
    block_row: tl.tensor,
    block_first: tl.tensor,
    block_count: tl.tensor,
    block_key: tl.tensor,
    shared: tl.tensor,
    branch: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    q_stride: tl.tensor,
    table_stride: tl.tensor,
    heads: tl.constexpr,
    group: tl.constexpr,
    dim: tl.constexpr,
    padded: tl.constexpr,
    page: tl.constexpr,
    rows: tl.constexpr,
    tile: tl.constexpr,
    splits: tl.constexpr,
    windowed: tl.constexpr,
    capped: tl.constexpr,
    branched: tl.constexpr,
) -> None:
    number = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    row = tl.load(block_row + number)
    first = tl.load(block_first + number)
    count = tl.load(block_count + number)
    start = tl.load(block_key + number)
    place = tl.arange(0, rows)
    there = place // group < count
    token = first + place // group
    query = start + place // group
    d = tl.arange(0, padded)
    q_at = q + tl.cast(token, tl.int64) * q_stride + (head * group + place % group) * dim
    if padded == dim:
        q_tile = tl.load(q_at[:, None] + d[None, :], mask=there[:, None], other=0.0)
    else:
        q_tile = tl.load(q_at[:, None] + d[None, :], mask=there[:, None] & (d < dim)[None, :], other=0.0)
    # Behind the prompt a branch goes on as if the branches before it were not there.
    behind = query
    if branched:
        shared_keys = tl.load(shared + token, mask=there, other=0)
        branch_key = tl.load(branch + token, mask=there, other=0)
        behind = query - branch_key + shared_keys
    low = 0
    high = start + count
    if windowed:
        nearest = tl.min(tl.where(there, behind, 2147483647), axis=0)
        # Without tokens `nearest` is the largest integer, and a step behind it, which is loaded ahead, would overflow.
        low = tl.minimum(tl.maximum(nearest - window + 1, 0) // tile * tile, high)
    if splits > 1:
        share = tl.cdiv(tl.cdiv(high - low, splits), tile) * tile
        low += split * share
        high = tl.minimum(low + share, high)
    k = tl.arange(0, tile)
    largest = tl.full([rows], float("-inf"), dtype=tl.float32)
    mass = tl.zeros([rows], dtype=tl.float32)
    total = tl.zeros([rows, padded], dtype=tl.float32)
    table = tables + tl.cast(row, tl.int64) * table_stride
    page_stride: tl.constexpr = heads * page * dim
    for at in range(low, high, tile):
        key = at + k
        in_page = tl.load(table + key // page, mask=key < high, other=0)
        offset = tl.cast(in_page, tl.int64) * page_stride + (head * page + key % page) * dim
        if padded == dim:
            k_tile = tl.load(keys + offset[None, :] + d[:, None], mask=(key < high)[None, :], other=0.0)
            v_tile = tl.load(values + offset[:, None] + d[None, :], mask=(key < high)[:, None], other=0.0)
        else:
            k_tile = tl.load(keys + offset[None, :] + d[:, None], mask=(key < high)[None, :] & (d < dim)[:, None], other=0.0)
            v_tile = tl.load(
                values + offset[:, None] + d[None, :], mask=(key < high)[:, None] & (d < dim)[None, :], other=0.0
            )
        scores = tl.dot(q_tile, k_tile, input_precision="tf32x3") * scale
        if capped:
            # softcap * tanh(scores / softcap), then in base 2.
            scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1)) * 1.4426950408889634
        visible = (key[None, :] <= query[:, None]) & there[:, None] & (key < high)[None, :]
        if branched:
            is_shared = key[None, :] < shared_keys[:, None]
            visible = visible & (is_shared | (key[None, :] >= branch_key[:, None]))
            if windowed:
                visible = visible & (tl.where(is_shared, behind[:, None], query[:, None]) - key[None, :] < window)
        elif windowed:
            visible = visible & (query[:, None] - key[None, :] < window)
        scores = tl.where(visible, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        # A row that has seen no key yet has no largest score to subtract.
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        decay = tl.exp2(largest - reference)
        scores = tl.exp2(scores - reference[:, None])
        mass = mass * decay + tl.sum(scores, axis=1)
        total = tl.dot(scores.to(v_tile.dtype), v_tile, total * decay[:, None], input_precision="tf32x3")
        largest = larger
    total = total / tl.where(mass == 0, 1.0, mass)[:, None]
    line = tl.cast(token, tl.int64) * (heads * group) + head * group + place % group
    keep = there[:, None] & (d < dim)[None, :]
    if splits == 1:
        tl.store(out + line[:, None] * dim + d[None, :], total.to(out.dtype.element_ty), mask=keep)
    else:
        line = line * splits + split
        tl.store(partial + line[:, None] * dim + d[None, :], total, mask=keep)
        tl.store(weight + line, tl.where(mass == 0, float("-inf"), largest + tl.log2(mass)), mask=there)


@jit
def _join(
    out: tl.tensor,
    partial: tl.tensor,
    weight: tl.tensor,
    block_first: tl.tensor,
    block_count: tl.tensor,
    heads: tl.constexpr,
    group: tl.constexpr,
    dim: tl.constexpr,
    padded: tl.constexpr,
    rows: tl.constexpr,
    splits: tl.constexpr,
) -> None:
    number = tl.program_id(0)
    place = tl.program_id(1)
    first = tl.load(block_first + number)
    if place // (heads * group) < tl.load(block_count + number):
        line = tl.cast(first, tl.int64) * (heads * group) + place
        split = tl.arange(0, splits)
        d = tl.arange(0, padded)
        weights = tl.load(weight + line * splits + split)
        weights = tl.exp2(weights - tl.max(weights, axis=0))
        parts = tl.load(partial + (line * splits + split)[:, None] * dim + d[None, :], mask=(d < dim)[None, :], other=0.0)
        joined = tl.sum(parts * weights[:, None], axis=0) / tl.sum(weights, axis=0)
        tl.store(out + line * dim + d, joined.to(out.dtype.element_ty), mask=d < dim)


@jit
def _store(
    k: tl.tensor,
    v: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    slots: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    heads: tl.constexpr,
    dim: tl.constexpr,
    page: tl.constexpr,
    padded: tl.constexpr,
) -> None:
    token = tl.cast(tl.program_id(0), tl.int64)
    slot = tl.cast(tl.load(slots + token), tl.int64)
    if slot >= 0:
        at = tl.arange(0, padded)
        there = at < heads * dim
        to = ((slot // page * heads + at // dim) * page + slot % page) * dim + at % dim
        tl.store(keys + to, tl.load(k + token * k_stride + at, mask=there), mask=there)
        tl.store(values + to, tl.load(v + token * v_stride + at, mask=there), mask=there)


def store_(k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Write the keys and values of new tokens to their places in the cache.

    Args:
        k, v: [tokens, cache heads, head_dim], in the cache's dtype; a token's values lie together, tokens may be apart.
        key_cache, value_cache: [pages, cache heads, page size, head_dim], contiguous.
        slots: int32 or int64 [tokens], page * page size + offset; a token of slot -1 is not written.
    """
    tokens, heads, dim = k.shape
    _store[(tokens,)](
        k,
        v,
        key_cache,
        value_cache,
        slots,
        k.stride(0),
        v.stride(0),
        heads=heads,
        dim=dim,
        page=key_cache.shape[2],
        padded=triton.next_power_of_2(heads * dim),
    )


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    tables: Tensor,
    queries: QueryBlocks,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    branches: Branches | None = None,
) -> Tensor:
    """Causal attention of new tokens over the pages of their rows; the new tokens' own keys are in the cache already.

    Args:
        q: [tokens, heads, head_dim], bfloat16, float16 or float32; a token's values lie together, tokens may be apart.
        key_cache, value_cache: [pages, cache heads, page size, head_dim], contiguous, in q's dtype.
        tables: int32 [rows, pages of the longest row]; key j of a row lies in page tables[row, j // page size].
        scale: what scores are multiplied with.
        window: a token sees only so many keys back, itself included; 0 for all.
        softcap: scores s become softcap * tanh(s / softcap); 0 for none (Gemma 2).
        branches: where rows hold several answers behind one prompt.

    Returns:
        [tokens, heads, head_dim], in q's dtype; what no query block covers is undefined.

    Raises:
        ModelError: head_dim or the heads do not fit.
    """
    tokens, heads, dim = q.shape
    _, cache_heads, page, _ = key_cache.shape
    _check(heads, cache_heads, dim, queries.rows, q.element_size())
    blocks = queries.row.shape[0]
    shape = _shape(queries.rows, dim, q.element_size())
    splits = _splits(blocks * cache_heads, tables.shape[1] * page, shape.tile, q.device) if queries.rows == 16 else 1
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    partial = torch.empty((tokens, heads, splits, dim), dtype=torch.float32, device=q.device) if splits > 1 else out
    weight = torch.empty((tokens, heads, splits), dtype=torch.float32, device=q.device) if splits > 1 else out
    sizes = {"heads": cache_heads, "group": heads // cache_heads, "dim": dim, "padded": max(16, triton.next_power_of_2(dim))}
    _attend[(blocks, cache_heads, splits)](
        q,
        key_cache,
        value_cache,
        out,
        partial,
        weight,
        tables,
        queries.row,
        queries.first,
        queries.count,
        queries.key,
        branches.shared if branches else queries.row,
        branches.branch if branches else queries.row,
        scale if softcap else scale * LOG2_E,
        softcap,
        window,
        q.stride(0),
        tables.stride(0),
        **sizes,
        page=page,
        rows=queries.rows,
        tile=shape.tile,
        splits=splits,
        windowed=window > 0,
        capped=softcap > 0,
        branched=branches is not None,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    if splits > 1:
        _join[(blocks, queries.rows // sizes["group"] * heads)](
            out, partial, weight, queries.first, queries.count, **sizes, rows=queries.rows, splits=splits, num_warps=1
        )
    return out


def tokens_of(rows: int, heads: int, cache_heads: int) -> int:
    """How many tokens a query block of so many rows holds at most."""
    return rows * cache_heads // heads


@dataclass(frozen=True)
class _Shape:
    tile: int
    warps: int
    stages: int


def _shape(rows: int, dim: int, size: int) -> _Shape:
    """The fastest of ten shapes on an H100; with all of them decoding reads keys near the memory's speed."""
    if size == 4:
        return _Shape(16 if dim > 128 else 32, 4 if rows < 64 else 8, 2)
    if dim > 128:
        return _Shape(32, 4 if rows < 128 else 8, 2)
    return _Shape(64, 4 if rows < 128 else 8, 3)


def _splits(programs: int, keys: int, tile: int, device: torch.device) -> int:
    """Over how many programs the keys of a block are split: a power of two that fills the GPU, and leaves each 4 tiles."""
    splits = 1
    while programs * splits < 2 * _processors(device) and keys >= 8 * tile * splits and splits < 32:
        splits *= 2
    return splits


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 8


def _check(heads: int, cache_heads: int, dim: int, rows: int, size: int) -> None:
    if heads % cache_heads:
        raise ModelError(f"the model has {heads} query heads and {cache_heads} cache heads", "The first must be a multiple")
    if dim % 8 or dim > 256:
        raise ModelError(f"the model's head_dim is {dim}", "The attention kernel takes multiples of 8, up to 256")
    if rows < heads // cache_heads:
        raise ModelError(f"a query block has {rows} rows for {heads // cache_heads} query heads", "Take more rows")
    if rows * dim * size > 1 << 16:
        raise ModelError(f"a query block has {rows} rows of {dim} values in float32", "Take 64 rows at most")
