"""Every token and text that the model declares as an end ends an answer, as transformers' generate has it."""

import re

import pytest
import torch
from engine.families import NEVER, build
from engine.listening import PATIENCE, Listener
from tiny_language_model import BOS, EOS, tiny_tokenizer

from lorafleet.engine import GenerationRequest

NEW = 16
TOKENIZER = tiny_tokenizer()
TEXTS = ["abc", "Once upon a time", "Name three colours.", "7", "The house is small.", "why? because"]
PROMPTS = [tuple(TOKENIZER(text)["input_ids"]) for text in TEXTS]


def generated(model, prompt, **how):
    """What transformers gives for a prompt, the end token included."""
    tokens = torch.tensor([prompt])
    with torch.inference_mode():
        whole = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=BOS,
            **how,
        )
    return whole[0, len(prompt) :].tolist()


def declaring(where, ends, other):
    """A model that names `ends` where `where` says; `other` is what the place that does not count has."""
    if where == "config":
        return build("llama", eos_token_id=ends)
    model = build("llama", eos_token_id=other)
    model.generation_config.eos_token_id = ends
    return model


@pytest.mark.parametrize("shift", [1, 4, 7])
@pytest.mark.parametrize("where", ["generation_config", "config", "both"])
def test_any_declared_end_token_ends_an_answer(make_engine, where, shift):
    """The ends are tokens that stand at different places of different answers, and one that none of them has."""
    free = [generated(build("llama", eos_token_id=NEVER), prompt) for prompt in PROMPTS]
    ends = [EOS, *sorted({answer[(shift + number) % NEW] for number, answer in enumerate(free[:3])})]
    other = free[4][0] if where == "both" else None
    assert other not in ends
    reference = declaring(where, ends, other)
    wanted = [generated(reference, prompt) for prompt in PROMPTS]
    assert len({answer[-1] for answer in wanted if answer[-1] in ends}) > 1, "more than one of them ends answers"

    engine = make_engine(declaring(where, ends, other), rows=4)
    asked = [GenerationRequest(prompt, max_tokens=NEW) for prompt in PROMPTS]
    for request, answer, whole in zip(asked, engine.generate(asked), wanted, strict=True):
        stopped = whole[-1] in ends
        assert list(answer.tokens) == (whole[:-1] if stopped else whole)
        assert answer.finish_reason == ("stop" if stopped else "length")
        pieces = list(engine.stream(request))
        assert tuple(piece.choice.token for piece in pieces if piece.choice) == answer.tokens
        assert "".join(piece.text for piece in pieces) == answer.text


def test_drawn_answers_end_at_the_first_declared_end(make_engine):
    asked = [GenerationRequest(prompt, max_tokens=40, temperature=1.5, seed=n) for prompt in PROMPTS for n in range(3)]
    free = make_engine(rows=6).generate(asked)
    ends = sorted({answer.tokens[5 + number % 9] for number, answer in enumerate(free)})[:4]
    engine = make_engine(build("llama", eos_token_id=ends), rows=6)
    listeners = [Listener() for _ in asked]
    futures = [engine.submit(request, listener) for request, listener in zip(asked, listeners, strict=True)]
    reasons = set()
    for future, listener, whole in zip(futures, listeners, free, strict=True):
        answer = future.result(PATIENCE)
        before = next((place for place, token in enumerate(whole.tokens) if token in ends), len(whole.tokens))
        assert answer.tokens == listener.tokens == whole.tokens[:before]
        assert answer.finish_reason == ("stop" if before < len(whole.tokens) else "length")
        reasons.add(answer.finish_reason)
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("declared", [1, 2])
def test_declared_stop_texts_end_answers_beside_those_of_the_request(make_engine, declared):
    free = make_engine().generate([GenerationRequest(prompt, max_tokens=NEW) for prompt in PROMPTS])
    # Of letters: what a random model writes is mostly half characters.
    letters = [re.findall("[!-~]{1,2}", answer.text) for answer in free]
    texts = [found[0] for found in letters if found][:declared]
    model = build("llama", eos_token_id=NEVER)
    model.generation_config.stop_strings = texts if declared > 1 else texts[0]
    wanted = [generated(model, prompt, tokenizer=TOKENIZER) for prompt in PROMPTS]
    answers = make_engine(model).generate([GenerationRequest(prompt, max_tokens=NEW) for prompt in PROMPTS])
    assert [list(answer.tokens) for answer in answers] == wanted
    stopped = [(answer, whole) for answer, whole in zip(answers, free, strict=True) if answer.finish_reason == "stop"]
    assert stopped and all(answer.text == whole.text[: len(answer.text)] != whole.text for answer, whole in stopped)
    assert not any(text in answer.text for answer in answers for text in texts)
