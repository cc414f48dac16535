"""Passes by CUDA graphs, for where launching them is what takes the time.

A small model's pass is thousands of kernels of a few microseconds each; a CPU cannot launch them as fast as a GPU computes
them. A graph of all of them is launched at once. It is captured for a shape of batches: tokens and columns are rounded up,
so that there are few shapes, and every batch is filled up to its shape.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorafleet.training.passes import Passes
from lorafleet.training.rows import BatchShape, TokenBatch, TokenRow, pad, shape_of

TOKENS_STEP = 32
FEWEST_COLUMNS = 8

logger = logging.getLogger(__name__)


def rounded(shape: BatchShape, rows: int) -> BatchShape:
    """The shape that stands for `shape` among few: so many rows, tokens in steps of TOKENS_STEP, columns in powers of 2."""
    columns = 2 ** math.ceil(math.log2(max(shape.columns, FEWEST_COLUMNS)))
    return BatchShape(rows, math.ceil(shape.tokens / TOKENS_STEP) * TOKENS_STEP, columns)


@dataclass
class _Captured:
    """A graph, and the tensors that it reads."""

    graph: torch.cuda.CUDAGraph
    batch: TokenBatch
    answers: torch.Tensor

    def replay(self, batch: TokenBatch, answers: torch.Tensor) -> None:
        self.batch.input_ids.copy_(batch.input_ids, non_blocking=True)
        self.batch.columns.copy_(batch.columns, non_blocking=True)
        self.batch.targets.copy_(batch.targets, non_blocking=True)
        self.answers.copy_(answers)
        self.graph.replay()


class GraphedPasses:
    """The same by CUDA graphs. The first batch of a shape is computed as it is, which warms up what it needs; the second is
    captured. If a model cannot be captured, that is warned of, and all batches are computed one by one.

    Args:
        passes: what is captured; without random numbers, and without waiting for the device.
        rows: in a batch, at most.
    """

    def __init__(self, passes: Passes, rows: int) -> None:
        self._passes, self._rows = passes, rows
        self._captured: dict[BatchShape, _Captured | None] = {}
        self._memory = torch.cuda.graph_pool_handle()
        # What is computed before a capture leaves traces of its stream behind, which must be the capture's own.
        self._stream = torch.cuda.Stream(passes.device)  # type: ignore[no-untyped-call]
        self._possible = True

    def add(self, rows: Sequence[TokenRow], answers: torch.Tensor) -> None:
        """Take a batch's share of the mean loss over `answers` tokens (a scalar on the device)."""
        shape = rounded(shape_of(rows), self._rows)
        batch = pad(rows, self._passes.pad_id, shape).to(self._passes.device)
        captured = self._captured.get(shape)
        if captured is None and self._possible and shape in self._captured:
            captured = self._capture(shape)
        self._captured[shape] = captured
        if captured is not None:
            captured.replay(batch, answers)
            return
        usual = torch.cuda.current_stream(self._passes.device)
        self._stream.wait_stream(usual)
        with torch.cuda.stream(self._stream):
            self._passes.run(batch, answers)
        usual.wait_stream(self._stream)

    def _capture(self, shape: BatchShape) -> _Captured | None:
        size = (shape.rows, shape.tokens), (shape.columns,), (shape.rows, shape.columns)
        batch = TokenBatch(*(torch.zeros(part, dtype=torch.int64, device=self._passes.device) for part in size))
        answers = torch.ones((), device=self._passes.device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (Ray's, tracking's) may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
                self._passes.run(batch, answers)
        except RuntimeError as error:
            self._possible = False
            reason = " ".join(str(error).split())
            logger.warning("no CUDA graphs, passes are launched kernel by kernel: %s", reason)
            return None
        return _Captured(graph, batch, answers)
