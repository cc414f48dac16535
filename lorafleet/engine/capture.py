"""A run over fixed tensors as one launch, whatever they hold when it is replayed."""

from collections.abc import Callable

import torch

WARM_UPS = 2


class GraphMemory:
    """Memory for what graphs compute; graphs share it that are never replayed at the same time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()


def capture(
    run: Callable[[], torch.Tensor], memory: GraphMemory, device: torch.device
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A CUDA graph of a run, and the tensor that each replay writes its result to."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads (Ray's, a pool's pinning) may call CUDA meanwhile.
    with torch.cuda.graph(graph, pool=memory.pool, capture_error_mode="thread_local"):
        result = run()
    return graph, result
