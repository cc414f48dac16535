"""The engine: a batch of different compositions answers as its rows do alone, and as PEFT and transformers do."""

import pytest
import torch
from conftest import MODULES, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_language_model import tiny_tokenizer

from lorafleet.composition import METHODS, Composition, load_adapter
from lorafleet.config import Models
from lorafleet.engine import GenerationRequest, ScoreRequest
from lorafleet.errors import CompositionError, RequestError, UnknownAdapter
from lorafleet.models import load_base_model, load_tokenizer
from lorafleet.prompts import encode_answer, encode_prompt

PROMPTS = [
    "Where can I buy a tennis ball?\nAnswer:",
    "Goal: dry a shirt\nAnswer:",
    "The twins left early. They were late. Why?",
    "Is the sentiment of the review negative or positive? A dull film, twice too long, with no heart.\nSentiment:",
    "Question: what is frozen water called?\nAnswer:",
    "Once upon a time",
    "Premise: It rains. Hypothesis: The street is wet.\nRelation:",
    "Name three colours.",
    "Translate to German: The house is small.",
    "Q: 3 + 4? A:",
    "Is this sentence grammatical? They is here.",
    "Write a headline for a story about a lost dog that came home by train.",
]


def compositions(names):
    first, second, third, *_ = names
    return [
        Composition(),
        Composition("linear", {first: 1.0}),
        Composition("linear", {first: 0.6, second: 0.4}),
        Composition("cat", {first: 0.5, second: 0.3, third: 0.2}),
        Composition("ties", {first: 0.5, third: 0.5}, density=0.5),
        Composition("magnitude_prune", {second: 0.7, third: 0.3}, density=0.7),
        Composition("mixture", {second: 1.2, third: -0.4}),
        Composition("dare_ties", {second: 0.2, third: 0.8}),
        Composition("dare_linear", {first: -0.3, third: 0.8}, density=0.6),
        Composition("fusion", {first: 0.1, second: 0.2, third: 0.7}),
        Composition("selection", {first: 0.1, third: 0.7}),
        Composition("svd", {first: 0.5, second: -0.9}),
    ]


@pytest.fixture
def engine(make_engine, make_adapter):
    adapters = [load_adapter(make_adapter(name, seed=number)) for number, name in enumerate(("one", "two", "three"))]
    return make_engine(tiny_llama(), adapters, rows=8)


def requests(names, **settings):
    return [GenerationRequest(p, c, max_tokens=12, **settings) for p, c in zip(PROMPTS, compositions(names), strict=True)]


def test_a_slot_of_a_row_that_overflowed_serves_the_next_one(engine):
    asked = [GenerationRequest(prompt, max_tokens=12, likeliest=1) for prompt in sorted(PROMPTS, key=len)[:8]]
    before = engine.generate(asked)
    beyond = Composition("cat", {"one": 1e30, "two": -1e30})
    doomed = [engine.submit(GenerationRequest(PROMPTS[-1], beyond, max_tokens=30)) for _ in range(8)]
    for future in doomed:
        with pytest.raises(CompositionError, match="weights of one, two overflow in float32"):
            future.result()
    after = engine.generate(asked)
    assert [one.tokens for one in after] == [one.tokens for one in before]
    told = [choice.log_probability for one in after for choice in one.choices]
    assert told == pytest.approx([choice.log_probability for one in before for choice in one.choices], abs=1e-4)


def test_a_batch_answers_as_its_rows_do_alone(engine):
    asked = requests(("one", "two", "three"))
    together = engine.generate(asked)
    assert [answer.tokens for answer in together] == [engine.generate([request])[0].tokens for request in asked]
    assert len({answer.tokens for answer in together}) == len(asked), "the compositions make a difference"


def test_rows_of_different_lengths_leave_the_batch_one_by_one(engine):
    asked = [
        GenerationRequest(prompt, composition, max_tokens=limit)
        for prompt, composition, limit in zip(
            PROMPTS, compositions(("one", "two", "three")), (1, 9, 3, 12, 2, 5, 7, 4, 6, 1, 10, 8), strict=True
        )
    ]
    for request, answer in zip(asked, engine.generate(asked), strict=True):
        alone = engine.generate([request])[0]
        assert answer.tokens == alone.tokens
        assert len(answer.tokens) == request.max_tokens or answer.finish_reason == "stop"


def test_scores_are_the_log_likelihoods_of_a_plain_forward_pass(engine, make_adapter):
    options = ("yes", "no, not at all", "ball", "a much longer answer than the others")
    asked = [ScoreRequest(p, options, c) for p, c in zip(PROMPTS, compositions(("one", "two", "three")), strict=True)]
    scores = engine.score(asked)
    reference = PeftModel.from_pretrained(tiny_llama(), make_adapter("one", seed=0), adapter_name="one")
    for option, score in zip(options, scores[1], strict=True):
        prompt = encode_prompt(engine.tokenizer, PROMPTS[1], 1000)
        answer = encode_answer(engine.tokenizer, option)
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        wanted = sum(float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))
        assert score.total == pytest.approx(wanted, rel=1e-4)
        assert (score.tokens, score.bytes) == (len(answer), len(option.encode()))
    for number, request in enumerate(asked):
        alone = engine.score([request])[0]
        assert [s.total for s in alone] == pytest.approx([s.total for s in scores[number]], rel=1e-4)


def test_bad_requests_are_refused_by_field(engine):
    for field, request in {
        "max_tokens": GenerationRequest("x", max_tokens=0),
        "temperature": GenerationRequest("x", temperature=-1),
        "top_p": GenerationRequest("x", top_p=0),
        "stop": GenerationRequest("x", stop=("fine", "")),
        "likeliest": GenerationRequest("x", likeliest=21),
    }.items():
        with pytest.raises(RequestError, match=field) as caught:
            engine.generate([request])
        assert caught.value.field == field
    with pytest.raises(UnknownAdapter, match="Did you mean two"):
        engine.generate([GenerationRequest("x", Composition("cat", {"twwo": 1.0}))])
    with pytest.raises(CompositionError, match="method is 'slerp'"):
        engine.generate([GenerationRequest("x", Composition("slerp", {"one": 1.0, "two": 1.0}))])


def test_an_empty_prompt_is_refused_where_nothing_begins_it(make_engine):
    engine = make_engine(tokenizer=tiny_tokenizer(adds_bos=False))
    for refused in (lambda: engine.submit(GenerationRequest("")), lambda: engine.submit_score(ScoreRequest("", ("yes",)))):
        with pytest.raises(RequestError, match="the prompt is empty") as caught:
            refused()
        assert caught.value.field == "prompt"


@pytest.mark.integration
def test_on_smollm2_a_batch_equals_its_rows_and_one_adapter_equals_peft(every_core, make_engine, tmp_path):
    settings = Models(dtype="float32", device="cpu")
    tokenizer = load_tokenizer(settings)
    for number, name in enumerate(("one", "two", "three")):
        model = get_peft_model(load_base_model(settings), LoraConfig(r=8, lora_alpha=16, target_modules=MODULES), name)
        torch.manual_seed(number)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.02)
        model.save_pretrained(tmp_path)
    adapters = [load_adapter(tmp_path / name) for name in ("one", "two", "three")]
    engine = make_engine(load_base_model(settings), adapters, tokenizer, rows=8)
    asked = requests(("one", "two", "three"))
    together = engine.generate(asked)
    assert [answer.tokens for answer in together] == [engine.generate([request])[0].tokens for request in asked]
    reference = PeftModel.from_pretrained(load_base_model(settings), tmp_path / "one", adapter_name="one")
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")
    with torch.inference_mode():
        wanted = reference.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=2)
    new = wanted[0, inputs["input_ids"].shape[1] :].tolist()
    assert list(together[1].tokens) == [token for token in new if token != 2]


def test_every_method_is_tried_above():
    assert {composition.method for composition in compositions("abc")} == set(METHODS)
