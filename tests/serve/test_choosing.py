"""What a request means, before anything is asked of a model."""

from typing import get_args

import pytest

from lorafleet.adapters import Roster
from lorafleet.config import Weighing
from lorafleet.weighing import WEIGHERS, settings_of
from serve.choosing import Choice, Wish, choose, wish_of
from serve.errors import ApiError
from serve.protocol import CompletionRequest, CompositionRequest, Retrieval, RouteRequest

NOBODY = Roster([])


def test_a_setting_is_held_against_the_weigher_of_the_request_else_against_that_of_the_settings():
    softmax = Weighing(weigher="softmax")
    given = CompositionRequest(p=0.5, top_k=7)
    assert wish_of(given, Weighing(weigher="nucleus")) == Wish(None, {"p": 0.5}, 7)
    with pytest.raises(ApiError) as refused:
        choose("auto", given, NOBODY, softmax)
    assert (refused.value.status, refused.value.param) == (400, "composition.p")
    assert "softmax has temperature and k" in refused.value.message
    named = CompositionRequest(weigher="nucleus", p=0.5, neighbours=True)
    assert choose("auto", named, NOBODY, softmax) == Choice(wish=Wish("nucleus", {"p": 0.5}, None, True))
    with pytest.raises(ApiError) as refused:
        wish_of(RouteRequest(input="x", weigher="uniform", temperature=1), Weighing())
    assert refused.value.param == "temperature"
    projected = RouteRequest(input="x", weigher="sparse_projection", penalty=0, k=5)
    assert wish_of(projected, Weighing()) == Wish("sparse_projection", {"k": 5, "penalty": 0})
    sharp = CompositionRequest(weigher="uniform", sharpness=4, abstain_below=0)
    assert wish_of(sharp, Weighing()) == Wish("uniform", {"sharpness": 4, "abstain_below": 0})


def test_settings_and_requests_know_every_weigher_and_its_settings():
    kinds = [Weighing.model_fields["weigher"].annotation, get_args(Retrieval.model_fields["weigher"].annotation)[0]]
    assert [get_args(kind) for kind in kinds] == [tuple(WEIGHERS)] * 2
    for name in WEIGHERS:
        assert {*settings_of(name)} <= {*Weighing.model_fields} & {*Retrieval.model_fields}


@pytest.mark.parametrize(
    "field", ["weigher", "p", "k", "temperature", "penalty", "sharpness", "abstain_below", "top_k", "neighbours"]
)
def test_a_named_model_and_explicit_weights_leave_nothing_to_retrieve(field):
    value = {
        "weigher": "uniform",
        "p": 0.5,
        "k": 2,
        "temperature": 0.5,
        "penalty": 0,
        "sharpness": 4,
        "abstain_below": 0,
        "top_k": 5,
        "neighbours": True,
    }[field]
    with pytest.raises(ApiError) as refused:
        choose("base", CompositionRequest(**{field: value}), NOBODY, Weighing())
    assert refused.value.param == f"composition.{field}"
    with pytest.raises(ApiError) as refused:
        CompositionRequest(**{field: value, "weights": {"copa": 1}})
    assert refused.value.param == f"composition.{field}"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
def test_a_prompt_is_one_or_several_texts_or_token_ids(prompt, prompts):
    assert CompletionRequest(prompt=prompt).prompts == prompts
