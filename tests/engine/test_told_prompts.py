"""The log-probabilities of a prompt's own tokens, and prompts of token ids."""

import pytest
import torch
from engine.families import build, random_adapter, with_peft
from tiny_language_model import tiny_tokenizer

from lorafleet.composition import Composition
from lorafleet.engine import GenerationRequest
from lorafleet.errors import RequestError
from lorafleet.prompts import encode_prompt

COMPOSITION = Composition("cat", {"own": 1.0})


def test_a_prompt_is_told_as_a_plain_forward_pass_has_it_beside_others_and_in_pieces(make_engine):
    own = random_adapter(build("llama"), "own")
    engine = make_engine(adapters=[own], prefill_tokens=16)
    reference = with_peft(build("llama"), own)
    asked = [
        GenerationRequest(f"{number} {'long ' * number}", COMPOSITION, tokens, likeliest=likeliest, tell_prompt=told)
        for number, (tokens, likeliest, told) in enumerate(
            [(4, 0, True), (0, 3, True), (3, 2, False), (0, 0, True), (2, 5, True), (1, 0, False), (3, 1, True)]
        )
    ]
    for request, answer in zip(asked, engine.generate(asked), strict=True):
        assert len(answer.tokens) == request.max_tokens
        prompt = encode_prompt(tiny_tokenizer(), request.prompt, 1000)
        with torch.inference_mode():
            logits = reference(input_ids=torch.tensor([[*prompt, *answer.tokens]])).logits[0].log_softmax(-1)
        if not request.tell_prompt:
            assert answer.prompt is None
            continue
        assert [answer.prompt.first, *(choice.token for choice in answer.prompt.choices)] == prompt
        for place, choice in enumerate([*answer.prompt.choices, *answer.choices]):
            assert choice.log_probability == pytest.approx(float(logits[place, choice.token]), abs=1e-4)
            values, tokens = logits[place].topk(request.likeliest)
            assert [token for token, _ in choice.likeliest] == tokens.tolist()
            assert [value for _, value in choice.likeliest] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_prompt_of_one_token_follows_nothing(make_engine):
    (answer,) = make_engine().generate([GenerationRequest((7,), max_tokens=0, tell_prompt=True)])
    assert (answer.prompt.first, answer.prompt.choices) == (7, ())
    assert (answer.text, answer.tokens, answer.finish_reason, answer.prompt_tokens) == ("", (), "length", 1)


def test_a_prompt_that_would_be_cut_is_not_told(make_engine):
    engine = make_engine(max_prompt_tokens=8)
    with pytest.raises(RequestError, match=r"prompt has \d+ tokens.*8"):
        engine.submit(GenerationRequest("x" * 20, tell_prompt=True))
    assert engine.generate([GenerationRequest("x" * 20, max_tokens=1)])[0].prompt_tokens == 8


def test_token_ids_are_the_text_that_they_stand_for(make_engine):
    engine = make_engine()
    ids = tuple(encode_prompt(tiny_tokenizer(), "the same", 1000))
    by_text, by_ids = engine.generate([GenerationRequest("the same", max_tokens=6), GenerationRequest(ids, max_tokens=6)])
    assert by_text.tokens == by_ids.tokens
    for ids, said in (((3, 259), "259.*0 to 258"), ((-1,), "-1"), ((), "empty")):
        with pytest.raises(RequestError, match=said) as caught:
            engine.submit(GenerationRequest(ids))
        assert caught.value.field == "prompt"
