"""Requests whose adapters are still being prepared: the others go on, and whoever leaves leaves nothing behind."""

import random
import threading
import time

import pytest
from engine.families import NEVER, build, random_adapter

from lorafleet.composition import METHODS, Composition
from lorafleet.engine import GenerationRequest, ScoreRequest
from lorafleet.engine.loop import Loop

PATIENCE = 60
PRUNED = Composition("magnitude_prune", {"one": 0.6, "two": 0.4}, 0.5)


@pytest.fixture
def gate(monkeypatch):
    """`magnitude_prune` prepares only once the gate is open."""
    opened = threading.Event()
    prepare = METHODS["magnitude_prune"].prepare

    def wait_and_prepare(*arguments):
        assert opened.wait(PATIENCE)
        return prepare(*arguments)

    monkeypatch.setattr(METHODS["magnitude_prune"], "prepare", wait_and_prepare)
    yield opened
    opened.set()


@pytest.fixture
def engine(make_engine):
    model = build("llama", eos_token_id=NEVER)
    adapters = [random_adapter(model, name, seed=number) for number, name in enumerate(("one", "two", "three", "four"))]
    return make_engine(model, adapters, rows=2, pages=6, prepared_share=1 / 3)


def asked(composition, word="abc", tokens=5):
    return GenerationRequest(word, composition, max_tokens=tokens)


def test_rows_go_on_while_adapters_are_prepared(engine, gate):
    gate.set()
    alone = engine.generate([asked(PRUNED)])[0].tokens
    scored = engine.score([ScoreRequest("abc", ("yes", "no"), PRUNED)])[0]
    other = Composition("magnitude_prune", {"three": 0.6, "four": 0.4}, 0.5)
    engine.generate([asked(other)])
    gate.clear()
    slow = [engine.submit(asked(PRUNED)) for _ in range(3)]
    scores = engine.submit_score(ScoreRequest("abc", ("yes", "no"), PRUNED))
    plain = [engine.submit(asked(Composition("cat", {"three": 1.0}), tokens=20)) for _ in range(4)]
    assert all(len(future.result(PATIENCE).tokens) == 20 for future in plain)
    assert not any(future.done() for future in (*slow, scores))
    assert engine.waiting == 4
    gate.set()
    assert {future.result(PATIENCE).tokens for future in slow} == {alone}
    assert [one.total for one in scores.result(PATIENCE)] == pytest.approx([one.total for one in scored], abs=1e-4)


def test_requests_beyond_the_share_hold_no_others_back_and_all_are_answered(engine, gate):
    many = [engine.submit(asked(Composition("magnitude_prune", {"one": 0.6, "two": 0.4}, n / 10))) for n in range(1, 9)]
    plain = engine.submit(asked(Composition("linear", {"three": 0.5, "four": 0.5}), tokens=20))
    assert len(plain.result(PATIENCE).tokens) == 20
    assert not any(future.done() for future in many)
    gate.set()
    assert all(len(future.result(PATIENCE).tokens) == 5 for future in many)


def test_the_engine_sleeps_while_there_is_nothing_but_to_wait(engine, gate, monkeypatch):
    steps = []
    step = Loop.step
    monkeypatch.setattr(Loop, "step", lambda self: steps.append(1) or step(self))
    slow = engine.submit(asked(PRUNED))
    time.sleep(0.5)
    assert 1 <= len(steps) <= 3
    gate.set()
    assert len(slow.result(PATIENCE).tokens) == 5


def test_a_cancelled_request_ends_its_preparation(engine, gate):
    """The fixture asks that no page is held afterwards."""
    doomed = [engine.submit(asked(PRUNED)), engine.submit_score(ScoreRequest("abc", ("yes",), PRUNED))]
    time.sleep(0.1)
    for future in doomed:
        assert future.cancel()
    assert len(engine.submit(asked(Composition("cat", {"one": 1.0}))).result(PATIENCE).tokens) == 5
    assert engine.waiting == 0
    gate.set()
    assert len(engine.submit(asked(PRUNED)).result(PATIENCE).tokens) == 5


@pytest.mark.parametrize("seed", [1, 2])
def test_of_many_requests_at_odds_for_few_pages_all_are_answered_as_alone(make_engine, seed):
    """Every method, adapters that are replaced, requests that leave at any moment; the fixture asks that nothing is held."""
    draws = random.Random(seed)
    model = build("llama", eos_token_id=NEVER)
    adapters = {name: random_adapter(model, name, seed=number) for number, name in enumerate("abcdef")}
    small = {"rows": 3, "pages": 7, "page_rank": 4, "prepared_share": 1 / 3, "prefill_tokens": 16, "longest": 64}
    engine = make_engine(model, adapters.values(), waiting=1000, **small)
    asked, futures = [], []
    for _ in range(150):
        weights = {name: draws.choice([1.0, 0.5, -0.4]) for name in draws.sample("abcdef", draws.randint(0, 4))}
        composition = Composition(draws.choice(list(METHODS)), weights, draws.choice([0.2, 0.3, 0.5, 0.7]))
        word = "ab c"[: draws.randint(1, 4)] * draws.randint(1, 7)
        if draws.random() < 0.8:
            asked.append(GenerationRequest(word, composition, max_tokens=draws.randint(1, 12)))
            futures.append(engine.submit(asked[-1]))
        else:
            asked.append(ScoreRequest(word, ("yes", "no way"), composition))
            futures.append(engine.submit_score(asked[-1]))
        if draws.random() < 0.4:
            draws.choice(futures).cancel()
        if draws.random() < 0.1:
            time.sleep(draws.random() * 0.02)
        if draws.random() < 0.05:
            name = draws.choice("abcdef")
            engine.pool.remove(name)
            engine.pool.add(adapters[name])
    both = zip(asked, futures, strict=True)
    left = [(request, future.result(PATIENCE)) for request, future in both if not future.cancelled()]
    assert len(left) > 75
    # Afterwards: DARE draws from the random numbers of the process.
    alone = make_engine(build("llama", eos_token_id=NEVER), adapters.values(), rows=1, pages=64, page_rank=4, longest=64)
    for request, answer in left:
        if isinstance(request, GenerationRequest):
            assert answer.tokens == alone.generate([request])[0].tokens
        else:
            expected = [one.total for one in alone.score([request])[0]]
            assert [one.total for one in answer] == pytest.approx(expected, abs=1e-3)
