"""Scores of options: any number of them, however long, each as if it were the only one."""

import pytest
from engine.families import build, random_adapter
from engine.listening import PATIENCE, Gate
from engine.test_families import log_likelihood

from lorafleet.composition import Composition
from lorafleet.engine import GenerationRequest, ScoreRequest
from lorafleet.errors import RequestError, UnknownAdapter

PROMPT = "Question: what is frozen water called?\nAnswer:"
OPTIONS = tuple(f"{'ice ' * (number % 5)}{number}" for number in range(60))


def test_many_options_and_more_than_a_pass_takes(make_engine):
    """60 options of up to 22 tokens, with passes of 16: a score is computed whole, whatever its length."""
    engine = make_engine(prefill_tokens=16)
    (found,) = engine.score([ScoreRequest(PROMPT, OPTIONS)])
    reference = build("llama")
    for score in found:
        assert score.total == pytest.approx(log_likelihood(reference, PROMPT, score.option), rel=1e-4)
        assert score.tokens == score.bytes + 1 == len(score.option) + 1
        assert score.by("sum") == score.total
        assert score.by("token") == pytest.approx(score.total / score.tokens)
        assert score.by("byte") == pytest.approx(score.total / score.bytes)


def test_an_option_scores_the_same_whatever_others_there_are(make_engine):
    own = random_adapter(build("gemma2"), "own")
    engine = make_engine(build("gemma2"), [own])
    composition = Composition("cat", {"own": -0.7})
    (together,) = engine.score([ScoreRequest(PROMPT, OPTIONS, composition)])
    for score in together[::7]:
        ((alone,),) = engine.score([ScoreRequest(PROMPT, (score.option,), composition)])
        assert alone.total == pytest.approx(score.total, rel=1e-4)
    ((once, again),) = engine.score([ScoreRequest(PROMPT, ("ice", "ice"), composition)])
    assert once.total == pytest.approx(again.total, rel=1e-6)


def test_scores_need_no_row(make_engine):
    """They go through while all rows are taken, and leave nothing in the cache."""
    engine = make_engine(rows=1, longest=512)
    gate = Gate()
    blocking = engine.submit(GenerationRequest(PROMPT, max_tokens=40), gate)
    gate.reached()
    requests = [ScoreRequest(f"{PROMPT} {number}", ("ice", "snow", "hail")) for number in range(20)]
    futures = [engine.submit_score(request) for request in requests]
    later = engine.submit(GenerationRequest(PROMPT, max_tokens=1))
    order = []
    futures[-1].add_done_callback(lambda _: order.append("scores"))
    blocking.add_done_callback(lambda _: order.append("row"))
    gate.open()
    assert all(len(future.result(PATIENCE)) == 3 for future in futures)
    assert blocking.result(PATIENCE).tokens[:1] == later.result(PATIENCE).tokens
    assert order == ["scores", "row"]


def test_notes_come_one_by_one(make_engine):
    notes = []
    make_engine().score([ScoreRequest(PROMPT, ("ice",))] * 5, notes.append)
    assert notes == [1] * 5


def test_bad_requests_are_refused(make_engine):
    engine = make_engine(longest=64)
    for options in ((), ("ice", "")):
        with pytest.raises(RequestError, match="Give at least one, none empty") as caught:
            engine.score([ScoreRequest(PROMPT, options)])
        assert caught.value.field == "options"
    with pytest.raises(RequestError, match="Allowed: 64"):
        engine.score([ScoreRequest(PROMPT, OPTIONS)])
    with pytest.raises(UnknownAdapter):
        engine.score([ScoreRequest(PROMPT, ("ice",), Composition("cat", {"nobody": 1.0}))])
