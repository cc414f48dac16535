"""Keys and values in pages, attended to by the kernel, give the logits that slots and plain torch give."""

import pytest
import torch
from conftest import tiny_llama
from interpreted import DEVICE

pytest.importorskip("triton", reason="triton is not installed")

from lorafleet.composition import ComposedModel
from lorafleet.engine.attention import Manner
from lorafleet.engine.paged_cache import PagedCache
from lorafleet.engine.runner import Runner
from lorafleet.engine.segments import Segment
from lorafleet.engine.slotted_cache import SlottedCache

LONGEST = 96


def runner(paged: bool) -> tuple[Runner, SlottedCache | PagedCache]:
    model = tiny_llama().to(DEVICE)
    cpu = DEVICE
    cache = PagedCache(model.config, 2**20, LONGEST, cpu, torch.float32) if paged else SlottedCache(4, LONGEST, cpu)
    return Runner(model, ComposedModel(model), cache), cache


def logits(paged: bool) -> list[torch.Tensor]:
    """Prompts in pieces, a score of several options beside them, a sequence that leaves, and steps of the others."""
    run, cache = runner(paged)
    tokens = torch.randint(3, 500, (4, LONGEST), generator=torch.Generator().manual_seed(5)).tolist()
    lengths = [41, 7, 19]
    rooms = [cache.reserve(length + 20) for length in lengths]
    options = [*tokens[3][:23], *tokens[3][30:38]]
    passing = cache.reserve(len(options), passing=True)
    found = [
        run.prefill([Segment(tokens[0][:25], 0, rooms[0], None, [])]),
        run.prefill(
            [
                Segment(tokens[0][25:41], 25, rooms[0], None, [15]),
                Segment(tokens[1][:7], 0, rooms[1], None, [6]),
                Segment(options, 0, passing, None, range(22, 31), (5, 0, 3)),
                Segment(tokens[2][:19], 0, rooms[2], None, [18]),
            ]
        ),
    ]
    cache.release(passing)
    left = [0, 1, 2]
    for step in range(6):
        if step == 3:
            cache.release(rooms[1])
            left = [0, 2]
        places = [lengths[row] + step for row in left]
        found.append(
            run.decode(
                [tokens[row][place] for row, place in zip(left, places, strict=True)],
                places,
                [rooms[row] for row in left],
                [None] * len(left),
            )
        )
    return found


def test_pages_give_the_logits_of_slots():
    with torch.inference_mode():
        for paged, slotted in zip(logits(paged=True), logits(paged=False), strict=True):
            torch.testing.assert_close(paged, slotted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("window", [8, 16])
def test_windows_over_a_prompt_with_options_are_those_of_slots(window, past):
    """A prompt of 12 tokens and two options, beside a prompt without any: every token sees the same keys."""
    draws = torch.Generator().manual_seed(7)
    prompt, options = 12, (3, 2)
    tokens = prompt - past + sum(options)
    query = torch.randn(1, 4, prompt + sum(options) + 20, 8, generator=draws)
    key, value = torch.randn(2, 1, 2, query.shape[2], 8, generator=draws)
    found = []
    for cache in (PagedCache(tiny_llama().config, 2**20, LONGEST, DEVICE, torch.float32), SlottedCache(4, LONGEST, DEVICE)):
        rooms = [cache.reserve(40), cache.reserve(20)]
        scored = Segment([0] * tokens, past, rooms[0], None, [], options)
        plain = Segment([0] * 20, 0, rooms[1], None, [])
        passes = [[Segment([0] * past, 0, rooms[0], None, [])]] if past else []
        start, outputs = 0, []
        for segments in (*passes, [scored, plain]):
            part = slice(start, start + sum(len(segment.tokens) for segment in segments))
            halves = (tensor[:, :, part].to(DEVICE) for tensor in (query, key, value))
            outputs.append(cache.prefill(segments).attend(0, *halves, Manner(8**-0.5, window)))
            start = part.stop
        found.append(torch.cat(outputs, dim=1))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_pages_run_out_and_come_back():
    _, cache = runner(paged=True)
    whole = cache.bytes
    rooms = []
    while (room := cache.reserve(LONGEST)) is not None:
        rooms.append(room)
    assert len(rooms) * len(rooms[0]) > 0
    assert len({page for room in rooms for page in room}) == sum(map(len, rooms)), "no page is given twice"
    cache.release(rooms.pop())
    assert cache.reserve(LONGEST) is not None
    assert cache.bytes == whole
