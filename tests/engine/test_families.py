"""Every family of models answers through the engine as it does through transformers and PEFT, token for token."""

import pytest
import torch
from engine.families import FAMILIES, NEVER, build, random_adapter, with_peft
from engine.listening import PATIENCE, Listener
from tiny_language_model import tiny_tokenizer

from lorafleet.composition import BASE, Composition
from lorafleet.engine import GenerationRequest, ScoreRequest
from lorafleet.prompts import encode_answer, encode_prompt

TOKENIZER = tiny_tokenizer()
PROMPTS = [
    "Where can I buy a tennis ball, and what does it cost?\nAnswer:",
    "Hi",
    "The twins left early. They were late. Why?",
    "Goal: dry a shirt\nAnswer:",
    "Name three colours of the rainbow.",
]
NEW = 10


def generated(model, ends_with=NEVER):
    """What transformers' generate answers to every prompt, without the end token."""
    answers = []
    for prompt in PROMPTS:
        tokens = torch.tensor([encode_prompt(TOKENIZER, prompt, 1000)])
        with torch.inference_mode():
            whole = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=ends_with,
                pad_token_id=0,
            )
        new = whole[0, tokens.shape[1] :].tolist()
        answers.append(tuple(new[:-1] if new[-1] == ends_with else new))
    return answers


def joined_late(engine, composition):
    """The engine's answers to every prompt; each joins while those before it are on their way."""
    asked = [GenerationRequest(prompt, composition, max_tokens=NEW) for prompt in PROMPTS]
    futures = []

    def submit_next():
        request = asked[len(futures)]
        futures.append(engine.submit(request, Listener(at=2, do=submit_next) if len(futures) + 1 < len(asked) else None))

    submit_next()
    return [futures[place].result(PATIENCE) for place in range(len(asked))]


@pytest.mark.parametrize("adapter", [None, "own"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_generate(make_engine, family, adapter):
    reference = build(family)
    own = random_adapter(reference, "own", seed=5)
    composition = BASE
    if adapter:
        reference, composition = with_peft(reference, own), Composition("cat", {"own": 1.0})
    free = generated(reference)
    assert len(set(free)) == len(PROMPTS), "the prompts make a difference"
    for prefill_tokens in (512, 7):
        engine = make_engine(build(family, eos_token_id=NEVER), [own], rows=4, prefill_tokens=prefill_tokens)
        assert [answer.tokens for answer in joined_late(engine, composition)] == free

    end = free[0][NEW // 2]
    asked = [GenerationRequest(prompt, composition, max_tokens=NEW) for prompt in PROMPTS]
    engine = make_engine(build(family, eos_token_id=end), [own], rows=4, prefill_tokens=20)
    answers = engine.generate(asked)
    assert [answer.tokens for answer in answers] == generated(reference, end)
    assert all((answer.finish_reason == "length") == (len(answer.tokens) == NEW) for answer in answers)
    assert answers[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("qwen2", {"use_sliding_window": False}),
        ("mistral", {"sliding_window": None}),
        ("gemma2", {"sliding_window": 4096}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma3", {"sliding_window": 4096}),
    ],
)
def test_windows_and_softcaps_make_a_difference_to_these_models(family, change):
    assert generated(build(family))[0] != generated(build(family, **change))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_log_likelihoods_of_a_plain_forward_pass(make_engine, family):
    options = ("yes", "no, not at all", "y", "yes, of course: it is as plain as day", "yes, never", "z")
    model = build(family)
    own = random_adapter(model, "own", seed=5)
    engine = make_engine(model, [own])
    for composition, reference in ((BASE, build(family)), (Composition("cat", {"own": 1.0}), with_peft(build(family), own))):
        found = engine.score([ScoreRequest(prompt, options, composition) for prompt in PROMPTS])
        for prompt, scores in zip(PROMPTS, found, strict=True):
            assert [score.option for score in scores] == list(options)
            for score in scores:
                assert score.total == pytest.approx(log_likelihood(reference, prompt, score.option), rel=1e-4)


def log_likelihood(model, prompt, option):
    start, rest = encode_prompt(TOKENIZER, prompt, 1000), encode_answer(TOKENIZER, option)
    with torch.inference_mode():
        found = model(input_ids=torch.tensor([start + rest])).logits[0].log_softmax(-1)
    return sum(float(found[len(start) - 1 + place, token]) for place, token in enumerate(rest))
