"""Memory stays within its bounds, however many requests and compositions come by."""

import random

import pytest
import torch
from engine.conftest import holds_nothing
from engine.families import FAMILIES, NEVER, SHAPE, build, random_adapter
from engine.listening import PATIENCE, Listener

from lorafleet.composition import METHODS, Composition
from lorafleet.engine import GenerationRequest, ScoreRequest
from lorafleet.engine.slotted_cache import SlottedCache
from lorafleet.errors import RequestError

ROWS, LONGEST = 3, 200
TOKEN_BYTES = 2 * 4 * SHAPE["num_hidden_layers"] * SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
"""Keys and values of a token in float32."""


def test_the_cache_never_grows_beyond_rows_of_the_longest(make_engine):
    engine = make_engine(rows=ROWS, longest=LONGEST)
    seen = []
    asked = [
        GenerationRequest("x" * length, max_tokens=tokens)
        for length, tokens in ((3, 5), (100, 20), (10, 100), (150, LONGEST - 151), (1, 1), (9, LONGEST - 10), (50, 60))
    ]
    futures = [engine.submit(request, lambda _: seen.append(engine.cache_bytes)) for request in asked]
    assert [len(future.result(PATIENCE).tokens) for future in futures] == [request.max_tokens for request in asked]
    assert max(seen) <= ROWS * LONGEST * TOKEN_BYTES
    assert seen[0] < max(seen), "it begins small"
    assert seen == sorted(seen)


def test_a_cache_that_grows_keeps_what_is_in_it(make_engine):
    """A row is on its way with 20 tokens when one comes that needs 190: the cache is made anew around it."""
    request = GenerationRequest("on its way", max_tokens=40)
    (alone,) = make_engine(rows=1).generate([request])
    engine = make_engine(rows=ROWS, longest=LONGEST)
    late, before = [], []

    def submit_long():
        before.append(engine.cache_bytes)
        late.append(engine.submit(GenerationRequest("x" * 150, max_tokens=5)))

    assert engine.submit(request, Listener(at=10, do=submit_long)).result(PATIENCE).tokens == alone.tokens
    assert late[0].result(PATIENCE).tokens == make_engine().generate([GenerationRequest("x" * 150, max_tokens=5)])[0].tokens
    assert engine.cache_bytes > before[0]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_slot_shows_nothing_of_who_had_it_before(make_engine, family):
    assert family in FAMILIES
    engine = make_engine(build(family, eos_token_id=NEVER), rows=1, longest=LONGEST)
    request = GenerationRequest("after a longer one", max_tokens=20)
    (fresh,) = engine.generate([request])
    engine.generate([GenerationRequest("y" * 150, max_tokens=40)])
    assert engine.generate([request])[0].tokens == fresh.tokens


def test_a_slot_is_cleared_as_far_as_it_was_reserved():
    """To clear all of a long slot behind every short answer would cost more than the answer."""
    cache = SlottedCache(2, LONGEST, torch.device("cpu"))
    slots = [cache.reserve(tokens) for tokens in (20, 30)]
    keys, values = cache.layer(0, torch.empty(1, 2, 0, 8))
    for kept in (keys, values):
        kept.fill_(float("nan"))
    cache.release(slots[1])
    for kept in (keys, values):
        assert not kept[1, :, :30].any()
        assert kept[1, :, 30:].isnan().all()
        assert kept[0].isnan().all()


def test_memory_does_not_grow_with_the_number_of_compositions(make_engine):
    adapters = [random_adapter(build("llama"), name, seed=number) for number, name in enumerate("abcd")]
    engine = make_engine(adapters=adapters, rows=4, longest=64, pages=8, page_rank=4)
    draws = random.Random(0)

    def compositions(count):
        for _ in range(count):
            names = draws.sample("abcd", draws.randint(1, 4))
            weights = {name: draws.uniform(-1, 1) for name in names}
            yield Composition(draws.choice(list(METHODS)), weights, draws.choice([0.3, 0.8]))

    def taken():
        tensors = [tensors for tensors in engine.pool.pages.tensors if tensors is not None]
        places = {half.data_ptr() for pair in tensors for half in (pair.a, pair.b)}
        return places, sum(pair.a.nbytes + pair.b.nbytes for pair in tensors), engine.cache_bytes

    engine.generate([GenerationRequest("begin", composition, max_tokens=30) for composition in compositions(8)])
    at_first = taken()
    for _ in range(10):
        asked = list(compositions(12))
        engine.generate([GenerationRequest("go on", composition, max_tokens=3) for composition in asked])
        engine.score([ScoreRequest("go on", ("yes", "no"), composition) for composition in asked])
        assert taken() == at_first
        assert sum(len(resident.pages) for resident in engine.pool._resident.values()) <= 8
        assert holds_nothing(engine)


def test_what_is_longer_than_a_slot_is_refused(make_engine):
    engine = make_engine(longest=32)
    assert len(engine.generate([GenerationRequest("x" * 15, max_tokens=16)])[0].tokens) == 16
    with pytest.raises(RequestError, match="max_tokens is 17, and the prompt has 16 tokens") as caught:
        engine.submit(GenerationRequest("x" * 15, max_tokens=17))
    assert caught.value.field == "max_tokens"
    (cut,) = engine.generate([GenerationRequest("x" * 99, max_tokens=1)])
    assert cut.prompt_tokens == 31
