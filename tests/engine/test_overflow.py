"""Rows whose adapters overflow the engine's dtype fail alone; the rows beside them answer as they do alone."""

import math
from dataclasses import replace

import pytest
import torch
from engine.families import NEVER, build, random_adapter

from lorafleet.composition import METHODS, Adapter, Composition, LowRank
from lorafleet.engine import GenerationRequest, ScoreRequest
from lorafleet.errors import CompositionError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def overflowing(like: Adapter, dtype: torch.dtype) -> Adapter:
    """An adapter of finite values whose products with a hidden state are not."""
    size = torch.finfo(dtype).max / 8
    return Adapter("huge", {name: LowRank(one.a.sign() * size, one.b.sign(), 1.0) for name, one in like.layers.items()})


@pytest.fixture(params=DTYPES, ids=str)
def engine(request, make_engine):
    model = build("llama", eos_token_id=NEVER).to(request.param)
    fine = [random_adapter(model, name, seed=number) for number, name in enumerate(("one", "two"))]
    # Two pages each: sums over positions meet those of other rows too.
    return make_engine(model, [*fine, overflowing(fine[0], request.param)], rows=8, page_rank=2)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_that_overflows_fails_alone(engine, method):
    both = {"one": 0.7, "two": 0.3}
    asked = [
        GenerationRequest("abc", composition, max_tokens=6, likeliest=2)
        for composition in (Composition("cat", both), Composition("linear", both), Composition("ties", both), Composition())
    ]
    alone = [engine.generate([request])[0] for request in asked]
    huge = Composition(method, {"huge": 2.0, "one": 0.5})
    doomed = engine.submit(GenerationRequest("abc", huge, max_tokens=6))
    together = [engine.submit(request) for request in asked]
    for future, wanted in zip(together, alone, strict=True):
        found = future.result()
        assert found.tokens == wanted.tokens
        assert found.log_probabilities == pytest.approx(wanted.log_probabilities, abs=0.05)
    with pytest.raises(
        CompositionError, match=r"weights of huge, one overflow in \w+\. Give smaller weights, or compute in"
    ):
        doomed.result()
    by_call = engine.generate([GenerationRequest("abc", huge, max_tokens=6), *asked])
    assert [one.tokens for one in by_call[1:]] == [one.tokens for one in alone]
    assert by_call[0].finish_reason == "error" and by_call[0].text == ""
    with pytest.raises(CompositionError, match="weights of huge, one overflow"):
        by_call[0].checked()


def test_scores_and_told_prompts_that_overflow_fail_alone(engine):
    huge = Composition("cat", {"huge": 1.0})
    fine = ScoreRequest("abc", ("yes", "no"), Composition("cat", {"one": 1.0}))
    wanted = [score.total for score in engine.score([fine])[0]]
    futures = [engine.submit_score(request) for request in (replace(fine, composition=huge), fine)]
    told = engine.submit(GenerationRequest("abc", huge, max_tokens=0, tell_prompt=True))
    assert [score.total for score in futures[1].result()] == pytest.approx(wanted, abs=0.05)
    for future in (futures[0], told):
        with pytest.raises(CompositionError, match="weights of huge overflow"):
            future.result()


def test_a_form_that_no_longer_fits_the_dtype_spoils_no_other_row(make_engine):
    """dare scales what it keeps by 1 / density: finite in the adapter, beyond float16 in its pages."""
    model = build("llama", eos_token_id=NEVER).half()
    fine = random_adapter(model, "one")
    wide = Adapter("wide", {name: LowRank(one.a.sign(), one.b.sign() * 6e4, 1.0) for name, one in fine.layers.items()})
    engine = make_engine(model, [fine, wide], rows=4)
    asked = GenerationRequest("abc", Composition("cat", {"one": 1.0}), max_tokens=6)
    wanted = engine.generate([asked])[0].tokens
    thinned = Composition("dare_linear", {"one": 0.1, "wide": 0.5}, density=0.01)
    futures = [engine.submit(replace(asked, composition=thinned)), engine.submit(asked)]
    with pytest.raises(CompositionError, match="overflow in float16"):
        futures[0].result()
    assert futures[1].result().tokens == wanted
    assert all(
        math.isfinite(float(half.abs().max())) for pair in engine.pool.pages.tensors if pair for half in (pair.a, pair.b)
    )
