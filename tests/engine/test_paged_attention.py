"""The attention kernel against attention in float64: on a GPU where there is one, else in Triton's interpreter."""

import math
from dataclasses import dataclass

import pytest
import torch
from interpreted import DEVICE

pytest.importorskip("triton", reason="triton is not installed")

from lorafleet.engine import paged_attention as room
from lorafleet.engine.paged_attention import Branches, QueryBlocks, paged_attention, store_, tokens_of
from lorafleet.errors import ModelError

# The interpreter cannot multiply in bfloat16.
SHORT = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Row:
    """A row of the batch: keys that lie in the cache already, then new tokens; answers are (shared, branch, tokens)."""

    past: int
    new: int
    answers: tuple[tuple[int, int, int], ...] = ()


class Cache:
    """Rows with random queries, keys and values, laid out in shuffled pages; what no row owns is not a number."""

    def __init__(self, rows, heads, cache_heads, dim, page=16, dtype=SHORT, seed=0):
        draws = torch.Generator().manual_seed(seed)
        self.rows, self.page = rows, page
        self.lengths = [row.past + row.new for row in rows]
        self.q, self.k, self.v = (
            [torch.randn(length, count, dim, generator=draws).to(dtype) for length in self.lengths]
            for count in (heads, cache_heads, cache_heads)
        )
        needed = [-(-length // page) for length in self.lengths]
        order = torch.randperm(sum(needed) + 2, generator=draws).tolist()
        self.tables = torch.zeros(len(rows), max(needed) + 1, dtype=torch.int32)
        for row, count in enumerate(needed):
            self.tables[row, :count] = torch.tensor([order.pop() for _ in range(count)])
        shape = (sum(needed) + 2, cache_heads, page, dim)
        self.key_cache, self.value_cache = (torch.full(shape, float("nan"), dtype=dtype, device=DEVICE) for _ in "kv")
        slots = [self.slots(row, 0, length) for row, length in enumerate(self.lengths)]
        store_(
            torch.cat(self.k).to(DEVICE), torch.cat(self.v).to(DEVICE), self.key_cache, self.value_cache, torch.cat(slots)
        )
        self.tables = self.tables.to(DEVICE)
        self.new = torch.cat([q[row.past :] for row, q in zip(rows, self.q, strict=True)]).to(DEVICE)

    def slots(self, row, first, last):
        keys = torch.arange(first, last, device=self.tables.device)
        return (self.tables[row, keys // self.page].long() * self.page + keys % self.page).to(DEVICE)

    def blocks(self, rows, spare=0):
        """The query blocks of all new tokens, and `spare` that are not in use."""
        most = tokens_of(rows, self.q[0].shape[1], self.k[0].shape[1])
        listed, packed = [], 0
        for number, row in enumerate(self.rows):
            for first in range(0, row.new, most):
                listed.append((number, packed + first, min(most, row.new - first), row.past + first))
            packed += row.new
        listed += [(0, 0, 0, 0)] * spare
        return QueryBlocks(rows, *torch.tensor(listed, dtype=torch.int32, device=DEVICE).T.contiguous())

    def branches(self):
        pairs = []
        for row in self.rows:
            pairs += [(0, 0)] * (row.new - sum(count for _, _, count in row.answers))
            pairs += [(shared, branch) for shared, branch, count in row.answers for _ in range(count)]
        return Branches(*torch.tensor(pairs, dtype=torch.int32, device=DEVICE).T.contiguous())

    def expected(self, scale, window=0, softcap=0.0):
        """Every new token's attention in float64, key by key as the definitions say."""
        branches = self.branches()
        shared, branch = branches.shared.tolist(), branches.branch.tolist()
        outputs, packed = [], 0
        for row, q, k, v in zip(self.rows, self.q, self.k, self.v, strict=True):
            group = q.shape[1] // k.shape[1]
            k, v = (tensor.double().repeat_interleave(group, dim=1) for tensor in (k, v))
            for i in range(row.past, row.past + row.new):
                s, b = shared[packed], branch[packed]
                seen = [j for j in range(i + 1) if j < s or j >= b]
                if window:
                    seen = [j for j in seen if ((i - b + s) - j if j < s else i - j) < window]
                scores = torch.einsum("hd,jhd->hj", q[i].double(), k[seen]) * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                outputs.append(torch.einsum("hj,jhd->hd", scores.softmax(dim=-1), v[seen]))
                packed += 1
        return torch.stack(outputs)


def error(found, wanted):
    return float((found.double().cpu() - wanted).norm() / wanted.norm())


DECODE = [Row(past, 1) for past in (0, 1, 15, 16, 40, 83, 130)]
PREFILL = [Row(0, 1), Row(0, 37), Row(50, 21), Row(15, 16), Row(0, 70)]
ANSWERS = [
    # Three answers behind a prompt that is in the cache, and two behind one that comes in the same pass.
    Row(30, 9, ((30, 30, 2), (30, 32, 4), (30, 36, 3))),
    Row(0, 28, ((20, 20, 5), (20, 25, 3))),
    Row(5, 6),
]
OPTIONS = {
    "plain": {},
    "window": {"window": 9},
    "softcap": {"softcap": 2.0},
    "window and softcap": {"window": 33, "softcap": 1.5},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("heads", "cache_heads", "dim"), [(2, 2, 64), (6, 2, 96), (8, 2, 32)])
@pytest.mark.parametrize(("rows", "tile_rows"), [(DECODE, 16), (PREFILL, 64)], ids=["decode", "prefill"])
def test_attention_over_pages_is_attention(rows, tile_rows, heads, cache_heads, dim, options):
    cache = Cache(rows, heads, cache_heads, dim, seed=heads)
    found = paged_attention(
        cache.new,
        cache.key_cache,
        cache.value_cache,
        cache.tables,
        cache.blocks(tile_rows, spare=2),
        dim**-0.5,
        **OPTIONS[options],
    )
    assert error(found, cache.expected(dim**-0.5, **OPTIONS[options])) < TOLERANCE[SHORT]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tile_rows", [16, 128])
def test_answers_behind_one_prompt_do_not_see_each_other(tile_rows, options):
    cache = Cache(ANSWERS, 4, 2, 64, page=32)
    found = paged_attention(
        cache.new,
        cache.key_cache,
        cache.value_cache,
        cache.tables,
        cache.blocks(tile_rows),
        0.2,
        branches=cache.branches(),
        **OPTIONS[options],
    )
    assert error(found, cache.expected(0.2, **OPTIONS[options])) < TOLERANCE[SHORT]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("splits", [2, 8])
def test_keys_that_are_split_over_programs_give_the_same(monkeypatch, splits, options):
    monkeypatch.setattr(room, "_splits", lambda *_: splits)
    cache = Cache([Row(200, 1), Row(3, 1), Row(64, 1), Row(90, 4, ((90, 90, 1), (90, 91, 3)))], 6, 2, 64)
    found = paged_attention(
        cache.new,
        cache.key_cache,
        cache.value_cache,
        cache.tables,
        cache.blocks(16, spare=1),
        0.125,
        branches=cache.branches(),
        **OPTIONS[options],
    )
    assert error(found, cache.expected(0.125, **OPTIONS[options])) < TOLERANCE[SHORT]


@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("dtype", [SHORT, torch.float32])
def test_wide_heads_and_full_precision(dtype, dim):
    cache = Cache([Row(70, 1), Row(0, 19)], 3, 1, dim, dtype=dtype)
    found = paged_attention(
        cache.new, cache.key_cache, cache.value_cache, cache.tables, cache.blocks(16), 1 / math.sqrt(dim)
    )
    assert error(found, cache.expected(1 / math.sqrt(dim))) < TOLERANCE[dtype]


def test_queries_keys_and_values_may_be_slices_of_one_product():
    cache = Cache([Row(20, 5)], 2, 2, 64)
    wide = torch.cat([torch.full((5, 1, 64), 7.0, device=DEVICE, dtype=SHORT), cache.new], dim=1)
    queries = cache.blocks(16)
    found = paged_attention(wide[:, 1:], cache.key_cache, cache.value_cache, cache.tables, queries, 0.1)
    assert torch.equal(found, paged_attention(cache.new, cache.key_cache, cache.value_cache, cache.tables, queries, 0.1))
    before = cache.key_cache.clone(), cache.value_cache.clone()
    fused = torch.randn(3, 6, 64, device=DEVICE).to(SHORT)
    slots = torch.tensor([int(cache.slots(0, 2, 3)), -1, int(cache.slots(0, 24, 25))], device=DEVICE)
    store_(fused[:, 2:4], fused[:, 4:], cache.key_cache, cache.value_cache, slots)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            for place, old in zip((2, 4), before, strict=True):
                old[slot // 16, :, slot % 16] = fused[token, place : place + 2]
    assert torch.equal(cache.key_cache.nan_to_num(), before[0].nan_to_num())
    assert torch.equal(cache.value_cache.nan_to_num(), before[1].nan_to_num())


def test_what_does_not_fit_is_refused():
    cache = Cache([Row(3, 1)], 4, 2, 64)
    with pytest.raises(ModelError, match="4 query heads and 3"):
        paged_attention(
            cache.new, cache.key_cache[:, :1].repeat(1, 3, 1, 1), cache.value_cache, cache.tables, cache.blocks(16), 1
        )
    with pytest.raises(ModelError, match="head_dim is 60"):
        paged_attention(cache.new[..., :60], cache.key_cache, cache.value_cache, cache.tables, cache.blocks(16), 1)
