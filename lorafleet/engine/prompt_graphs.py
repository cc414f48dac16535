"""Passes over prompts by CUDA graphs: launched one by one, their kernels would keep a GPU waiting for the CPU.

A graph is captured for a number of tokens; what a pass has less is filled up with tokens that store and read nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from lorafleet.composition import ComposedModel, Run
from lorafleet.composition.blocks import BlockTable
from lorafleet.composition.tables import block_count, block_for, contents, empty_table, fill
from lorafleet.engine.capture import GraphMemory, capture
from lorafleet.engine.paged_attention import QueryBlocks
from lorafleet.engine.paged_cache import PREFILL_ROWS, PagedAttention, PagedCache, Pages, query_blocks, slots_of, tables_of
from lorafleet.engine.segments import PASS_PROMPTS, Segment

SIZES = (32, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3072)
SPARE_BLOCKS = 8
"""A prompt begins a block of its own. This many blocks are added to one and a half times those that the tokens fill."""
ENTRIES_PER_BLOCK = 8
WANTED = 64


@dataclass
class _Pass:
    """A captured pass over a number of tokens.

    Attributes:
        inputs: int32 [3, tokens]: ids, places in their texts, slots.
        wanted: int32 [WANTED], whose logits the pass gives.
        queries: int32 [4, blocks], as in `QueryBlocks`.
        tables: int32 [PASS_PROMPTS, pages], the pages of every segment's sequence.
        adapters: their entries; None for a pass without adapters.
    """

    inputs: torch.Tensor
    wanted: torch.Tensor
    queries: torch.Tensor
    tables: torch.Tensor
    adapters: BlockTable | None
    graph: torch.cuda.CUDAGraph = field(default_factory=torch.cuda.CUDAGraph)
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class PromptGraphs:
    """The captured passes of a model, made when first used.

    Args:
        most: tokens of a pass.
    """

    def __init__(
        self, model: PreTrainedModel, composed: ComposedModel, cache: PagedCache, most: int, memory: GraphMemory
    ) -> None:
        self._model, self._composed, self._cache, self._memory = model, composed, cache, memory
        self._sizes = [*(size for size in SIZES if size < most), most]
        self._passes: dict[tuple[int, bool], _Pass] = {}
        self._version = -1

    def warm_up(self) -> None:
        """Capture every size, with adapters and without."""
        for size in reversed(self._sizes):
            for composed in (True, False):
                self._pass(size, composed)

    def prefill(self, segments: Sequence[Segment[Pages]]) -> torch.Tensor | None:
        """The logits that segments want, float32 [wanted, vocabulary]; None where they do not fit into a graph."""
        count = sum(len(segment.tokens) for segment in segments)
        wanted = sum(len(segment.wanted) for segment in segments)
        size = next((size for size in self._sizes if size >= count), None)
        if size is None or len(segments) > PASS_PROMPTS or wanted > WANTED or any(segment.options for segment in segments):
            return None
        composed = any(segment.lease is not None and segment.lease.pages.size for segment in segments)
        found = self._pass(size, composed)
        if found.adapters is not None and not self._fill(found.adapters, segments):
            return None
        self._place(found, segments)
        found.graph.replay()
        return found.logits[:wanted].float()

    def _fill(self, table: BlockTable, segments: Sequence[Segment[Pages]]) -> bool:
        runs = [Run(segment.lease, len(segment.tokens)) for segment in segments]
        if block_count(runs, table.block) > table.blocks:
            return False
        found = contents(runs, self._composed.pool.pages, table.positions, table.block, table.blocks)
        if len(found.entry_page) > table.capacity:
            return False
        fill(table, found)
        return True

    def _place(self, found: _Pass, segments: Sequence[Segment[Pages]]) -> None:
        inputs = np.zeros(found.inputs.shape, dtype=np.int32)
        inputs[2] = -1
        wanted = np.zeros(WANTED, dtype=np.int32)
        start = first = 0
        for segment in segments:
            end = start + len(segment.tokens)
            inputs[0, start:end] = segment.tokens
            inputs[1, start:end] = segment.positions()
            inputs[2, start:end] = slots_of(segment.room, np.arange(segment.past, segment.past + end - start))
            wanted[first : first + len(segment.wanted)] = [start + place for place in segment.wanted]
            start, first = end, first + len(segment.wanted)
        queries = np.zeros(found.queries.shape, dtype=np.int32)
        blocks = query_blocks(segments, self._cache.block_tokens)
        queries[:, : blocks.shape[1]] = blocks
        tables = tables_of([segment.room for segment in segments])
        for target, values in (
            (found.inputs, inputs),
            (found.wanted, wanted),
            (found.queries, queries),
            (found.tables[: tables.shape[0], : tables.shape[1]], tables),
        ):
            target.copy_(torch.from_numpy(values), non_blocking=True)

    def _pass(self, size: int, composed: bool) -> _Pass:
        pages = self._composed.pool.pages
        if self._version != pages.version:
            self._passes.clear()
            self._version = pages.version
        if (size, composed) not in self._passes:
            self._passes[size, composed] = self._captured(size, composed)
        return self._passes[size, composed]

    def _captured(self, size: int, composed: bool) -> _Pass:
        cache, device, positions = self._cache, self._cache.device, self._composed.pool.pages.positions
        block = block_for(size)
        blocks = -(-size // block)
        blocks += min(blocks // 2 + SPARE_BLOCKS, PASS_PROMPTS)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        made = _Pass(
            zeros(3, size),
            zeros(WANTED),
            zeros(4, -(-size // cache.block_tokens) + PASS_PROMPTS),
            zeros(PASS_PROMPTS, cache.widest),
            empty_table(block, blocks, ENTRIES_PER_BLOCK * blocks, positions, device) if composed else None,
        )
        made.inputs[2] = -1
        with self._composed.pool.preparing_paused():
            made.graph, made.logits = capture(lambda: self._forward(made), self._memory, device)
        return made

    def _forward(self, made: _Pass) -> torch.Tensor:
        tokens, places, slots = made.inputs
        attention = PagedAttention(self._cache, slots, made.tables, QueryBlocks(PREFILL_ROWS, *made.queries))
        with self._composed.following(made.adapters):
            output = self._model(
                input_ids=tokens[None],
                position_ids=places[None],
                use_cache=False,
                logits_to_keep=made.wanted,
                attention_pass=attention,
            )
        logits: torch.Tensor = output.logits[0]
        return logits
