"""What every row of a pass takes of the pages, for the plain torch products."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorafleet.composition.pages import Pages
from lorafleet.composition.pool import Lease

TOKENS_ALONE = 32
"""A run of so many tokens is a block by itself: it reads its own pages, and no others' for nothing."""
WASTE = 3
"""For few tokens, neighbouring pages are read where they lie, those between them too, if that reads at most so many times
what is needed; a block by itself would multiply them all for nothing, and has those that it needs copied together."""


@dataclass(frozen=True)
class Run:
    """Tokens in a row under one composition; no lease is the base model."""

    lease: Lease | None
    tokens: int


@dataclass(frozen=True)
class Block:
    """Tokens that are multiplied with the same pages.

    Attributes:
        tokens: from and to, among those of the pass.
        pages: a slice, or int64 [n] on the device where they do not lie together.
        direct, gather, spread: [n, tokens], None where no row uses it.
        unused: bool [n, tokens], the pages that a token takes nothing of; None where every token takes of every page.
        places: [n, positions], one-hot: the position of each page in its adapter; None where all are the first.
    """

    tokens: slice
    pages: slice | torch.Tensor
    direct: torch.Tensor | None
    gather: torch.Tensor | None
    spread: torch.Tensor | None
    unused: torch.Tensor | None
    places: torch.Tensor | None


@dataclass(frozen=True)
class Plan:
    """The blocks of a pass; tokens that are in none are the base model's."""

    tokens: int
    blocks: tuple[Block, ...]


def make_plan(runs: Sequence[Run], pages: Pages) -> Plan:
    """The plan of a pass whose tokens are these runs, one behind the other."""
    blocks: list[Block] = []
    together: list[Run] = []
    start = 0
    for run in runs:
        if run.tokens >= TOKENS_ALONE:
            start = _close(blocks, together, start, pages)
            start = _close(blocks, [run], start, pages, waste=1)
        else:
            together.append(run)
    end = _close(blocks, together, start, pages)
    return Plan(end, tuple(blocks))


def _close(blocks: list[Block], runs: list[Run], start: int, pages: Pages, waste: int = WASTE) -> int:
    """Make a block of runs, empty the list, and say where the next one starts."""
    end = start + sum(run.tokens for run in runs)
    used = np.unique(np.concatenate([run.lease.pages for run in runs if run.lease] or [np.zeros(0, np.int64)]))
    if used.size:
        hull = int(used[-1] - used[0]) + 1
        together = hull <= waste * used.size
        chosen = np.arange(used[0], used[-1] + 1) if together else used
        read = slice(int(used[0]), int(used[-1]) + 1) if together else torch.from_numpy(used).to(pages.device)
        coefficients = _coefficients(runs, chosen)
        direct, gather, spread = (
            torch.from_numpy(table).T.contiguous().to(pages.device, pages.dtype) if table.any() else None
            for table in coefficients
        )
        unused = ~coefficients[:2].any(axis=0).T
        mask = torch.from_numpy(np.ascontiguousarray(unused)).to(pages.device) if unused.any() else None
        blocks.append(Block(slice(start, end), read, direct, gather, spread, mask, _places(pages, chosen)))
    runs.clear()
    return end


def _coefficients(runs: Sequence[Run], chosen: np.ndarray) -> np.ndarray:
    """Direct, gather and spread of each token and page, float32 [3, tokens, n]."""
    rows = np.zeros((3, len(runs), chosen.size), dtype=np.float32)
    for number, run in enumerate(runs):
        if run.lease:
            rows[:, number, np.searchsorted(chosen, run.lease.pages)] = run.lease.coefficients
    return np.repeat(rows, [run.tokens for run in runs], axis=1)


def _places(pages: Pages, chosen: np.ndarray) -> torch.Tensor | None:
    positions = pages.position[chosen]
    if not positions.any():
        return None
    return torch.from_numpy(np.eye(positions.max() + 1)[positions]).to(pages.device, pages.dtype)
