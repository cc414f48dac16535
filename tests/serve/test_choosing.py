"""What a request means, before anything is asked of a model."""

import json
from typing import get_args

import pytest
from pydantic import ValidationError

from lorafleet.adapters import Roster
from lorafleet.config import Weighing
from lorafleet.weighing import MOST_PROTOTYPES, WEIGHERS, settings_of
from serve.choosing import Choice, Wish, choose, wish_of
from serve.errors import ApiError
from serve.generator import within_reach
from serve.json_body import read_json
from serve.protocol.requests import ChatCompletionRequest, CompletionRequest, CompositionRequest, Retrieval, RouteRequest

NOBODY = Roster([])


def test_a_setting_is_held_against_the_weigher_of_the_request_else_against_the_one_that_weighs():
    wish = choose("auto", CompositionRequest(p=0.5, top_k=7), NOBODY).wish
    assert wish == Wish(None, {"p": 0.5}, 7, prefix="composition.")
    wish.check("nucleus")
    with pytest.raises(ApiError) as refused:
        wish.check("softmax")
    assert (refused.value.status, refused.value.param) == (400, "composition.p")
    assert "softmax has temperature and k" in refused.value.message
    named = CompositionRequest(weigher="nucleus", p=0.5, neighbours=True)
    assert choose("auto", named, NOBODY) == Choice(wish=Wish("nucleus", {"p": 0.5}, None, True, "composition."))
    with pytest.raises(ApiError) as refused:
        wish_of(RouteRequest(input="x", weigher="uniform", temperature=1))
    assert refused.value.param == "temperature"
    projected = RouteRequest(input="x", weigher="sparse_projection", penalty=0, k=5)
    assert wish_of(projected) == Wish("sparse_projection", {"k": 5, "penalty": 0})
    with pytest.raises(ApiError) as refused:
        wish_of(CompositionRequest(weigher="sparse_projection", k=MOST_PROTOTYPES + 1), "composition.")
    assert refused.value.param == "composition.k" and "k is 65. Allowed: at most 64" in refused.value.message
    assert wish_of(CompositionRequest(weigher="uniform", k=1000)).settings == {"k": 1000}
    sharp = CompositionRequest(weigher="uniform", sharpness=4, abstain_below=0)
    assert wish_of(sharp) == Wish("uniform", {"sharpness": 4, "abstain_below": 0})


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "ok \udc00"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": "x"}], "stop": ["\ud800"]}, "stop.0"),
        ({"messages": [{"role": "user", "content": "x"}], "composition": {"weights": {"\ud800": 1}}}, "composition.weights"),
    ],
)
def test_half_a_character_is_refused_by_its_field(body, field):
    with pytest.raises(ApiError) as refused:
        read_json(json.dumps(body).encode())
    assert (refused.value.status, refused.value.param) == (400, field)
    refused.value.response()


def test_whole_characters_and_weights_within_bounds_are_taken():
    assert ChatCompletionRequest(messages=[{"role": "user", "content": "\U0001f600 né"}]).query == "\U0001f600 né"
    assert CompositionRequest(weights={"copa": -100, "piqa": 100}, density=0.01)
    for wrong in ({"penalty": 100.1}, {"weights": {"copa": 1e20}}, {"weights": {"copa": -101}}, {"density": 1e-50}):
        with pytest.raises(ValidationError):
            CompositionRequest(**wrong)


def test_found_weights_keep_to_the_adapters_that_are_loaded():
    loaded = {"copa", "piqa"}
    found = {"copa": 0.6, "piqa": 0.4}
    assert within_reach(found, loaded) == found
    assert within_reach({"copa": 0.3, "squad": 0.7}, loaded) == {"copa": 1.0}
    assert within_reach({"squad": 1.0}, loaded) == {}, "the base model answers"
    assert within_reach({"squad": 1.2, "copa": -0.2}, loaded) == {}


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
        choose("base", CompositionRequest(**{field: value}), NOBODY)
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
