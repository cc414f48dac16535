"""Passes that a CUDA graph replays give what the same passes give when they are launched one by one."""

import pytest
import torch
from interpreted import DEVICE

pytest.importorskip("triton", reason="triton is not installed")
if DEVICE.type != "cuda":
    pytest.skip("CUDA graphs need a GPU", allow_module_level=True)

from tiny_language_model import tiny_model

from benchmarks.fleet import random_adapters
from lorafleet.composition import ComposedModel, Composition
from lorafleet.engine.capture import GraphMemory
from lorafleet.engine.graphs import DecodeGraphs
from lorafleet.engine.paged_cache import PagedCache
from lorafleet.engine.prompt_graphs import PromptGraphs
from lorafleet.engine.runner import Runner
from lorafleet.engine.segments import Segment

MIXTURES = [{"adapter-00": 0.5, "adapter-01": 0.9}, {}, {"adapter-02": 1.0}, {"adapter-01": -0.7, "adapter-02": 0.4}]


@torch.inference_mode()
def logits(graphs: bool, composed: bool) -> list[torch.Tensor]:
    """Prompts together, one of them in two pieces, another pass of fewer tokens, then steps of all sequences."""
    model = tiny_model().to(DEVICE, torch.bfloat16)
    layers = ComposedModel(model, pages=8, page_rank=16)
    for adapter in random_adapters(model, 3, 16):
        layers.pool.add(adapter)
    cache = PagedCache(model.config, 2**22, 512, DEVICE, torch.bfloat16)
    memory = GraphMemory()
    made = (DecodeGraphs(model, layers, cache, 4, memory), PromptGraphs(model, layers, cache, 300, memory))
    runner = Runner(model, layers, cache, *(made if graphs else (None, None)))
    weights = MIXTURES if composed else [{}] * 4
    leases = [layers.pool.lease(layers.pool.recipe(Composition("linear", row))) for row in weights]
    lengths = [150, 40, 33, 20]
    rooms = [cache.reserve(length + 8) for length in lengths]
    ids = torch.randint(3, 250, (4, 160), generator=torch.Generator().manual_seed(3)).tolist()

    def segment(row: int, first: int, last: int, wanted: list[int]) -> Segment:
        return Segment(ids[row][first:last], first, rooms[row], leases[row], wanted)

    found = [
        runner.prefill([segment(0, 0, 100, []), segment(1, 0, 40, [39])]),
        runner.prefill([segment(0, 100, 150, [0, 49]), segment(2, 0, 33, [32]), segment(3, 0, 20, [19])]),
    ]
    for step in range(3):
        places = [length + step for length in lengths]
        tokens = [ids[row][step] for row in range(4)]
        found.append(runner.decode(tokens, places, rooms, leases))
        # As in the loop, which reads a step's answer before it fills in the next one's tokens.
        torch.cuda.synchronize()
    return found


@pytest.mark.parametrize("composed", [True, False])
def test_a_replayed_pass_gives_what_the_launched_one_gives(composed):
    replayed, launched = logits(True, composed), logits(False, composed)
    assert [len(part) for part in replayed] == [1, 4, 4, 4, 4]
    for one, other in zip(replayed, launched, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * float(other.abs().max()))
