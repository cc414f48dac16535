"""Adapters come, change and go while rows that use them are on their way."""

import random
from functools import partial

import pytest
from engine.families import build, random_adapter
from engine.listening import PATIENCE, Gate, Listener

from lorafleet.composition import METHODS, Composition
from lorafleet.engine import GenerationRequest, ScoreRequest
from lorafleet.errors import CompositionError, UnknownAdapter


def adapter(name, version=0, rank=4):
    return random_adapter(build("llama"), name, seed=version * 100 + ord(name[0]), rank=rank)


def using(*names, prompt="a prompt", method="cat", tokens=15):
    return GenerationRequest(f"{prompt} {names}", Composition(method, dict.fromkeys(names, 0.8)), max_tokens=tokens)


@pytest.fixture
def alone(make_engine):
    """The tokens that an engine with these adapters alone answers to one request."""
    engine = make_engine(rows=1)

    def answered(request, *adapters):
        for name in engine.pool:
            engine.pool.remove(name)
        for adapter in adapters:
            engine.pool.add(adapter)
        return engine.generate([request])[0].tokens

    return answered


@pytest.mark.parametrize("method", [method for method in METHODS if method != "selection"])
def test_rows_keep_the_adapters_that_they_began_with(make_engine, alone, method):
    a, b, newer = adapter("a"), adapter("b"), adapter("a", version=1)
    engine = make_engine(adapters=(a, b), rows=3)
    both, removed, single = using("a", "b", method=method), using("b"), using("a")

    def replace():
        engine.pool.add(newer)
        engine.pool.remove("b")
        later.append(engine.submit(single))
        with pytest.raises(UnknownAdapter):
            engine.submit(removed)

    later = []
    futures = [engine.submit(both, Listener(at=4, do=replace)), engine.submit(removed), engine.submit(single)]
    found = [future.result(PATIENCE).tokens for future in futures]
    assert found == [alone(both, a, b), alone(removed, b), alone(single, a)]
    assert later[0].result(PATIENCE).tokens == alone(single, newer) != found[2]


def test_requests_that_wait_keep_the_adapters_they_were_asked_with(make_engine, alone):
    a, newer = adapter("a"), adapter("a", version=1)
    engine = make_engine(adapters=[a], rows=1)
    gate = Gate()
    blocking = engine.submit(using("a", prompt="blocking"), gate)
    gate.reached()
    before = engine.submit(using("a"))
    scored = engine.submit_score(ScoreRequest("a prompt", ("yes", "no"), using("a").composition))
    engine.pool.add(newer)
    after = engine.submit(using("a"))
    engine.pool.remove("a")
    gate.open()
    assert blocking.result(PATIENCE).tokens == alone(using("a", prompt="blocking"), a)
    assert before.result(PATIENCE).tokens == alone(using("a"), a)
    assert after.result(PATIENCE).tokens == alone(using("a"), newer)
    wanted = make_engine(adapters=[a]).score([ScoreRequest("a prompt", ("yes", "no"), using("a").composition)])[0]
    assert [score.total for score in scored.result(PATIENCE)] == pytest.approx([score.total for score in wanted], rel=1e-5)


@pytest.mark.parametrize("tokens", [16, 19])
def test_passes_of_equal_shape_have_their_own_adapters(make_engine, alone, tokens):
    """Pieces of prompts as long as a decoding step is wide, or as another's piece: only the compositions tell them apart."""
    a, b = adapter("a"), adapter("b")
    engine = make_engine(adapters=(a, b), rows=2, prefill_tokens=1 if tokens == 16 else 3)
    late = []
    request = GenerationRequest("x" * (tokens - 1), using("b").composition, max_tokens=6)
    first = using("a", tokens=60)
    found = engine.submit(first, Listener(at=2, do=lambda: late.append(engine.submit(request)))).result(PATIENCE).tokens
    assert found == alone(first, a)
    assert late[0].result(PATIENCE).tokens == alone(request, b)


def test_an_adapter_that_is_replaced_again_and_again_leaves_no_pages(make_engine, alone):
    engine = make_engine(rows=4, pages=4)
    versions = [adapter("a", version) for version in range(8)]
    futures = []
    for version in versions:
        engine.pool.add(version)
        futures.append(engine.submit(using("a")))
    answers = [future.result(PATIENCE).tokens for future in futures]
    assert answers == [alone(using("a"), version) for version in versions]
    assert len(set(answers)) == len(versions)
    engine.pool.remove("a")
    engine.generate([GenerationRequest("the base model alone", max_tokens=1)])
    assert engine.pool.pages.free == 4


@pytest.mark.parametrize("pages", [3, 4, 7])
def test_requests_wait_for_pages_and_are_answered(make_engine, alone, pages):
    """Six adapters of different ranks share a few pages; rows in flight hold theirs, and others wait."""
    adapters = {name: adapter(name, rank=rank) for name, rank in zip("abcdef", (4, 4, 4, 8, 12, 2), strict=True)}
    engine = make_engine(adapters=adapters.values(), rows=4, pages=pages, page_rank=4)
    draws = random.Random(0)
    asked = []
    while len(asked) < 16:
        names = sorted(draws.sample("abcdef", draws.randint(1, 3)))
        if sum(-(-adapters[name].rank // 4) for name in names) <= pages:
            asked.append(using(*names, tokens=draws.randint(2, 12)))
    seen = []

    def look(_):
        seen.append((engine.running, engine.waiting))

    futures = [engine.submit(request, look) for request in asked]
    for request, future in zip(asked, futures, strict=True):
        assert future.result(PATIENCE).tokens == alone(request, *adapters.values())
    assert any(running < 4 and waiting for running, waiting in seen), "a row is free, and pages are short"


def test_what_can_never_fit_is_refused_at_once(make_engine):
    engine = make_engine(adapters=(adapter("a"), adapter("b")), pages=1, page_rank=4)
    with pytest.raises(CompositionError, match="takes 8 ranks, the pool has room for 4"):
        engine.submit(using("a", "b"))
    assert len(engine.generate([using("b", tokens=3)])[0].tokens) == 3


def test_what_waits_for_pages_stops_only_what_comes_behind_it(make_engine):
    """Scores and rows on their way go on; a request that waits is not overtaken by one that would fit."""
    engine = make_engine(adapters=(adapter("a"), adapter("b"), adapter("c")), rows=3, pages=2, page_rank=4)
    finished = []
    late = []

    def submit_others():
        for name, request in {"both": using("b", "c", tokens=2), "base": GenerationRequest("fits", max_tokens=2)}.items():
            late.append(engine.submit(request))
            late[-1].add_done_callback(partial(lambda name, _: finished.append(name), name))
        late.append(engine.submit_score(ScoreRequest("a prompt", ("yes", "no"), using("a").composition)))
        late[-1].add_done_callback(lambda _: finished.append("score"))

    first = engine.submit(using("a", tokens=12), Listener(at=3, do=submit_others))
    first.add_done_callback(lambda _: finished.append("first"))
    first.result(PATIENCE)
    for future in late:
        future.result(PATIENCE)
    assert finished[:2] == ["score", "first"] and set(finished) == {"score", "first", "both", "base"}
