"""Decoding by CUDA graphs: a step is one launch, whatever the rows and their compositions are.

A graph is captured for a number of rows; fewer are filled up with rows that store and read nothing. What changes from
step to step (tokens, places, pages, adapters and how much of each) lies in tensors whose addresses the graph knows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from lorafleet.composition import ComposedModel, Lease, Run
from lorafleet.composition.blocks import BlockTable
from lorafleet.composition.tables import block_for, contents, empty_table, fill
from lorafleet.engine.capture import GraphMemory, capture
from lorafleet.engine.paged_attention import QueryBlocks
from lorafleet.engine.paged_cache import DECODE_ROWS, PAGE_TOKENS, PagedAttention, PagedCache, Pages, tables_of

SIZES = (1, 2, 4, 8, 16, 32, 48)
SIZE_STEP = 32
ENTRIES_PER_ROW = 8
LEAST_ENTRIES = 64


@dataclass
class _Step:
    """A captured step for a number of rows.

    Attributes:
        inputs: int32 [4, rows]: tokens, places, slots, and 1 for rows in use.
        table: the adapters' entries; None for a step without adapters.
    """

    rows: int
    inputs: torch.Tensor
    staged: torch.Tensor
    pages: torch.Tensor
    table: BlockTable | None
    graph: torch.cuda.CUDAGraph = field(default_factory=torch.cuda.CUDAGraph)
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    leases: list[Lease | None] = field(default_factory=list)
    rooms: list[Pages] = field(default_factory=list)


class DecodeGraphs:
    """The captured steps of a model, made when first used.

    Args:
        rows: the most sequences at once.
    """

    def __init__(
        self, model: PreTrainedModel, composed: ComposedModel, cache: PagedCache, rows: int, memory: GraphMemory
    ) -> None:
        self._model, self._composed, self._cache, self._memory = model, composed, cache, memory
        self._sizes = sorted({rows, *(size for size in (*SIZES, *range(2 * SIZE_STEP, rows, SIZE_STEP)) if size < rows)})
        self._steps: dict[tuple[int, bool], _Step] = {}
        self._version = -1

    def warm_up(self) -> None:
        """Capture every size, with adapters and without."""
        for size in reversed(self._sizes):
            for composed in (True, False):
                self._step(size, composed)

    def decode(
        self, tokens: Sequence[int], pasts: Sequence[int], rooms: Sequence[Pages], leases: Sequence[Lease | None]
    ) -> torch.Tensor | None:
        """The logits of one more token of each sequence, float32 [sequences, vocabulary].

        None where the rows read more pages of adapters than a graph has room for.
        """
        count = len(tokens)
        composed = any(lease is not None and lease.pages.size for lease in leases)
        step = self._step(next(size for size in self._sizes if size >= count), composed)
        if step.table is not None and not self._fill(step, step.table, list(leases)):
            return None
        self._place(step, list(rooms))
        places = np.array(pasts)
        # A row's newest page, for its place, lies in the table that was just made for it.
        inputs = step.staged.numpy()
        inputs[0, :count], inputs[1, :count] = tokens, places
        inputs[2, :count] = [
            room[place // PAGE_TOKENS] * PAGE_TOKENS + place % PAGE_TOKENS for room, place in zip(rooms, pasts, strict=True)
        ]
        inputs[3, :count] = 1
        inputs[:2, count:], inputs[2, count:], inputs[3, count:] = 0, -1, 0
        step.inputs.copy_(step.staged, non_blocking=True)
        step.graph.replay()
        return step.logits[:count].float()

    def _fill(self, step: _Step, table: BlockTable, leases: list[Lease | None]) -> bool:
        if step.leases != leases:
            runs = [Run(lease, 1) for lease in leases]
            found = contents(runs, self._composed.pool.pages, table.positions, table.block, table.blocks)
            if len(found.entry_page) > table.capacity:
                return False
            fill(table, found)
            step.leases = leases
        return True

    def _place(self, step: _Step, rooms: list[Pages]) -> None:
        if step.rooms != rooms:
            tables = torch.from_numpy(tables_of(rooms))
            step.pages[: tables.shape[0], : tables.shape[1]].copy_(tables, non_blocking=True)
            step.rooms = rooms

    def _step(self, rows: int, composed: bool) -> _Step:
        pages = self._composed.pool.pages
        if self._version != pages.version:
            self._steps.clear()
            self._version = pages.version
        if (rows, composed) not in self._steps:
            self._steps[rows, composed] = self._captured(rows, composed)
        return self._steps[rows, composed]

    def _captured(self, rows: int, composed: bool) -> _Step:
        device, pages = self._cache.device, self._composed.pool.pages
        block = block_for(rows)
        blocks = -(-rows // block)
        capacity = min(blocks * pages.count, max(LEAST_ENTRIES, ENTRIES_PER_ROW * rows))
        inputs = torch.zeros(4, rows, dtype=torch.int32, device=device)
        inputs[2] = -1
        step = _Step(
            rows,
            inputs,
            torch.zeros(4, rows, dtype=torch.int32).pin_memory(),
            torch.zeros(rows, self._cache.widest, dtype=torch.int32, device=device),
            empty_table(block, blocks, capacity, pages.positions, device) if composed else None,
        )
        with self._composed.pool.preparing_paused():
            step.graph, step.logits = capture(lambda: self._forward(step), self._memory, device)
        return step

    def _forward(self, step: _Step) -> torch.Tensor:
        tokens, places, slots, used = step.inputs
        rows = torch.arange(step.rows, dtype=torch.int32, device=self._cache.device)
        attention = PagedAttention(self._cache, slots, step.pages, QueryBlocks(DECODE_ROWS, rows, rows, used, places))
        with self._composed.following(step.table):
            output = self._model(
                input_ids=tokens[None], position_ids=places[None], use_cache=False, attention_pass=attention
            )
        logits: torch.Tensor = output.logits[0]
        return logits
