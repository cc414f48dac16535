"""From the runs of a pass to the kernels' table of blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorafleet.composition.blocks import BlockTable
from lorafleet.composition.pages import Pages
from lorafleet.composition.plan import Run

BLOCKS = {16: 16, 32: 32, 64: 64, 256: 128}
"""Up to so many tokens, blocks of so many: as few as hold them all; every block reads the pages that it uses."""
PROMPT_BLOCK = 64


def block_for(tokens: int) -> int:
    """Tokens of a block, for a pass over so many tokens."""
    return next((block for most, block in BLOCKS.items() if tokens <= most), PROMPT_BLOCK)


@dataclass(frozen=True)
class Contents:
    """What a table holds, as in `BlockTable`, on the CPU; `coefficients` are direct, gather and spread."""

    bounds: np.ndarray
    entry_page: np.ndarray
    starts: np.ndarray
    sums: np.ndarray
    coefficients: np.ndarray


def contents(runs: Sequence[Run], pages: Pages, positions: int, block: int, blocks: int | None = None) -> Contents:
    """The entries of every block: the pages that any of its tokens reads, by position and then by page.

    Args:
        positions: those of the table; the pages' own may rise meanwhile, when another thread adds a wider adapter.
        block: the most tokens of a block.
        blocks: how many blocks the table has, where it is more than the tokens fill.
    """
    used = np.unique(np.concatenate([run.lease.pages for run in runs if run.lease] or [np.zeros(0, np.int64)]))
    rows = np.zeros((len(runs), 3, used.size), dtype=np.float32)
    for number, run in enumerate(runs):
        if run.lease:
            rows[number][:, np.searchsorted(used, run.lease.pages)] = run.lease.coefficients
    counts = np.array([run.tokens for run in runs])
    bounds = _bounds(counts, block)
    tokens = np.arange(counts.sum())
    owners = np.searchsorted(bounds, tokens, side="right") - 1
    total = blocks or len(bounds) - 1
    by_block = np.zeros((total, block, 3, used.size), dtype=np.float32)
    by_block[owners, tokens - bounds[owners]] = np.repeat(rows, counts, axis=0)
    order = np.lexsort((used, pages.position[used]))
    reads = np.asarray(by_block.any(axis=(1, 2)))
    entry_block, place = np.nonzero(reads[:, order])
    place = order[place]
    groups = entry_block * positions + pages.position[used[place]]
    starts = np.asarray(np.searchsorted(groups, np.arange(total * positions + 1)))
    return Contents(
        np.pad(bounds, (0, total + 1 - len(bounds)), mode="edge").astype(np.int32),
        used[place].astype(np.int32),
        starts.astype(np.int32),
        np.asarray(by_block[:, :, 1].any(axis=(1, 2))).astype(np.int32),
        by_block[entry_block, :, :, place].transpose(2, 0, 1),
    )


def block_count(runs: Sequence[Run], block: int) -> int:
    """How many blocks the runs of a pass fill."""
    return len(_bounds(np.array([run.tokens for run in runs]), block)) - 1


def _bounds(counts: np.ndarray, block: int) -> np.ndarray:
    """Where blocks begin, and where the last one ends: a long run begins a block, short ones share."""
    bounds, end = [0], 0
    for count in counts.tolist():
        begins = count >= block // 2
        if end > bounds[-1] and (begins or end + count - bounds[-1] > block):
            bounds.append(end)
        end += count
        while end - bounds[-1] > block:
            bounds.append(bounds[-1] + block)
        if begins and end > bounds[-1]:
            bounds.append(end)
    return np.array([*bounds, end] if end > bounds[-1] or len(bounds) == 1 else bounds)


def make_table(runs: Sequence[Run], pages: Pages, block: int) -> BlockTable:
    """A table for one pass."""
    positions = pages.positions
    found = contents(runs, pages, positions, block)
    table = empty_table(block, len(found.sums), max(len(found.entry_page), 1), positions, pages.device)
    fill(table, found)
    return table


def empty_table(block: int, blocks: int, capacity: int, positions: int, device: torch.device) -> BlockTable:
    """A table whose tensors stay where they are: a CUDA graph may capture them, and `fill` change what they hold."""

    def make(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    return BlockTable(
        block,
        positions,
        make(torch.int32, blocks + 1),
        make(torch.int32, capacity),
        make(torch.int32, blocks * positions + 1),
        make(torch.int32, blocks),
        *(make(torch.float32, capacity, block) for _ in range(3)),
    )


def fill(table: BlockTable, found: Contents) -> None:
    """Write contents, of as many blocks and positions as the table has, and no more entries than it has room for."""
    entries = len(found.entry_page)
    targets = (table.direct, table.gather, table.spread)
    for target, values in (
        (table.bounds, found.bounds),
        (table.entry_page[:entries], found.entry_page),
        (table.starts, found.starts),
        (table.sums, found.sums),
        *((target[:entries], found.coefficients[number]) for number, target in enumerate(targets)),
    ):
        target.copy_(torch.from_numpy(np.ascontiguousarray(values)), non_blocking=True)
