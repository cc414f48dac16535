"""How tokens are chosen: by the distribution that was asked for, and repeatably."""

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from engine.families import build, random_adapter, with_peft
from engine.listening import PATIENCE, Listener
from tiny_language_model import tiny_tokenizer

from lorafleet.composition import Composition
from lorafleet.engine import GenerationRequest
from lorafleet.engine.sampling import Draw, choose
from lorafleet.prompts import encode_prompt

DRAWS = 20000
LOGITS = torch.tensor([0.3, -1.0, 2.0, 1.9, 0.0, -3.0, 1.0])


def counts(temperature, top_p=1.0, seed=0):
    """How often each token is drawn; every draw is a row with a seed of its own."""
    draws = [Draw(temperature, top_p, random.Random(seed + number)) for number in range(DRAWS)]
    return Counter(choose(LOGITS.expand(DRAWS, -1), draws).read().tokens)


def nucleus(temperature, top_p):
    """The smallest set of the likeliest tokens with at least this mass, and their shares of it."""
    shares = (LOGITS.double() / temperature).softmax(-1).tolist()
    kept, mass = {}, 0.0
    for token in sorted(range(len(shares)), key=lambda token: -shares[token]):
        kept[token] = shares[token]
        mass += shares[token]
        if mass >= top_p:
            break
    return {token: share / mass for token, share in kept.items()}


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.8, 0.5, 0.01])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_follow_the_softmax_of_the_nucleus(temperature, top_p):
    wanted = nucleus(temperature, top_p)
    found = counts(temperature, top_p)
    assert set(found) <= set(wanted), "nothing outside is drawn"
    assert {token for token, share in wanted.items() if share * DRAWS > 30} <= set(found), "and everything inside"
    chi_square = sum((found[token] - share * DRAWS) ** 2 / (share * DRAWS) for token, share in wanted.items())
    freedom = len(wanted) - 1
    # Five standard deviations of the statistic; the seeds are fixed.
    assert chi_square <= freedom + 5 * math.sqrt(2 * freedom)


def test_a_seed_draws_the_same_beside_any_others():
    alone = [choose(LOGITS[None], [Draw(1.0, 0.9, random.Random(seed))]).read().tokens[0] for seed in range(50)]
    for others in (0, 1, 5):
        rows = LOGITS.repeat(50 + others, 1)
        greedy = [Draw(0.0, 1.0, random.Random(99)) for _ in range(others)]
        draws = [*greedy, *(Draw(1.0, 0.9, random.Random(seed)) for seed in range(50))]
        chosen = choose(rows, draws).read()
        assert chosen.tokens == [2] * others + alone
    assert len(set(alone)) > 2


def test_temperature_near_zero_is_greedy_and_likelihoods_are_those_of_temperature_one():
    log_probabilities = LOGITS.log_softmax(-1)
    for temperature in (0.0, 1e-3, 1e-30, 1e-39, 5e-324):
        chosen = choose(LOGITS[None], [Draw(temperature, 1.0, random.Random(0))], likeliest=3).read()
        assert chosen.tokens == [2]
        assert chosen.log_probabilities == pytest.approx([float(log_probabilities[2])])
        assert [token for token, _ in chosen.likeliest[0]] == [2, 3, 6]
        assert [value for _, value in chosen.likeliest[0]] == pytest.approx(log_probabilities[[2, 3, 6]].tolist())


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_log_probabilities_and_likeliest_tokens_are_those_of_a_plain_forward_pass(make_engine, temperature):
    own = random_adapter(build("llama"), "own")
    engine = make_engine(adapters=[own])
    reference = with_peft(build("llama"), own)
    composition = Composition("cat", {"own": 1.0})
    numbers = (0, 1, 5, 20)
    asked = [
        GenerationRequest(f"prompt {'long ' * n}", composition, 9, temperature, 0.9, seed=n, likeliest=n) for n in numbers
    ]
    for request, answer in zip(asked, engine.generate(asked), strict=True):
        prompt = encode_prompt(tiny_tokenizer(), request.prompt, 1000)
        with torch.inference_mode():
            logits = reference(input_ids=torch.tensor([[*prompt, *answer.tokens]])).logits[0].log_softmax(-1)
        for place, choice in enumerate(answer.choices, start=len(prompt) - 1):
            assert choice.log_probability == pytest.approx(float(logits[place, choice.token]), abs=1e-4)
            values, tokens = logits[place].topk(request.likeliest)
            assert [token for token, _ in choice.likeliest] == tokens.tolist()
            assert [value for _, value in choice.likeliest] == pytest.approx(values.tolist(), abs=1e-4)
        assert answer.log_probabilities == tuple(choice.log_probability for choice in answer.choices)


def test_a_seed_repeats_its_answer_in_a_batch_that_changes(make_engine):
    engine = make_engine(rows=3)
    request = GenerationRequest("the same every time", max_tokens=20, temperature=1.0, top_p=0.95, seed=5)
    alone = engine.generate([request])[0].tokens
    others = [GenerationRequest(f"other {n}", max_tokens=3 + n, temperature=0.5 * (n % 3), seed=n) for n in range(6)]
    joining = []
    futures = [engine.submit(other) for other in others[:3]]
    listener = Listener(at=5, do=lambda: joining.extend(engine.submit(other) for other in others[3:]))
    assert engine.submit(request, listener).result(PATIENCE).tokens == alone
    assert all(future.result(PATIENCE) for future in [*futures, *joining])
    different = {engine.generate([replace(request, seed=seed)])[0].tokens for seed in range(5)}
    assert len(different) == 5


def test_a_seed_and_its_negative_draw_differently(make_engine):
    engine = make_engine()
    asked = [GenerationRequest("any", max_tokens=20, temperature=1.5, seed=seed) for seed in (-2, -1, 0, 1, 2)]
    answers = [answer.tokens for answer in engine.generate(asked)]
    assert len(set(answers)) == 5
    assert [answer.tokens for answer in engine.generate(asked)] == answers


def test_without_a_seed_draws_differ(make_engine):
    engine = make_engine()
    request = GenerationRequest("any", max_tokens=20, temperature=1.5)
    assert len({answer.tokens for answer in engine.generate([request] * 5)}) == 5
