"""A long prompt costs the generator what one that fits costs, once for all answers, and nothing on its event loop."""

import asyncio
import threading
from dataclasses import replace

import pytest
from engine.families import NEVER, build, random_adapter
from long_writings import counting, writing
from tiny_language_model import tiny_tokenizer

from lorafleet.adapters import Roster, StoredAdapter
from lorafleet.config import load_settings
from lorafleet.engine import Engine
from lorafleet.errors import RequestError
from lorafleet.prompts import encode_prompt
from serve.choosing import Choice
from serve.generator import Generator
from serve.messages import Order, Sampling, Weighed
from serve.metrics import GenerationMetrics

LONG = writing("english", 10**6)
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


@pytest.fixture
def generator():
    """The deployment's class over a real engine, without the cluster."""
    tokenizer = counting(tiny_tokenizer())
    tokenizer.chat_template = TEMPLATE
    engine = Engine(build("llama", eos_token_id=NEVER), tokenizer, rows=4, longest=900, max_prompt_tokens=600)
    generator = object.__new__(Generator.func_or_class)
    generator._engine, generator._settings, generator._roster = engine, load_settings(), Roster()
    generator._metrics = GenerationMetrics(engine, 4)
    yield generator
    engine.close()


def order(prompt, n=1, max_tokens=2, **how):
    return Order(prompt, Choice({}, None, None), Sampling(max_tokens, 0.0, 1.0, None, (), n, **how))


async def streamed(generator, asked):
    return [news async for news in generator.stream(asked)]


@pytest.mark.parametrize("prompt", [LONG, (("system", "Be brief."), ("user", LONG))])
@pytest.mark.parametrize("run", [lambda generator, asked: generator.complete(asked), streamed])
def test_a_long_prompt_is_read_once_at_its_ends_and_off_the_loop(generator, prompt, run):
    read = generator._engine.tokenizer.read
    asyncio.run(run(generator, order(prompt, n=16)))
    assert sum(length > 0 for length, _ in read) == 2, "its head and its tail"
    assert sum(length for length, _ in read) < 10_000
    assert threading.get_ident() not in {thread for _, thread in read}


def test_all_answers_are_those_to_the_cut_prompt(generator):
    tokens = tuple(encode_prompt(tiny_tokenizer(), LONG, 600))
    long, cut = (asyncio.run(generator.complete(order(prompt, n=3))) for prompt in (LONG, tokens))
    assert [one.text for one in long.continuations] == [one.text for one in cut.continuations]
    assert {one.ended.prompt_tokens for one in long.continuations} == {600}


@pytest.mark.parametrize("likeliest", [None, 0])
def test_a_prompt_that_would_be_cut_is_not_echoed(generator, likeliest):
    with pytest.raises(RequestError, match=r"prompt has more than 600 tokens.*600") as caught:
        asyncio.run(generator.complete(order(LONG, echo=True, likeliest=likeliest)))
    assert caught.value.field == "prompt"
    with pytest.raises(RequestError, match=r"prompt has 701 tokens"):
        asyncio.run(generator.complete(order("x" * 700, echo=True, likeliest=likeliest)))
    completed = asyncio.run(generator.complete(order("x" * 500, n=2, echo=True, likeliest=likeliest)))
    assert completed.begun.echo == "x" * 500


def test_long_token_ids_are_decoded_off_the_loop(generator, monkeypatch):
    tokenizer, threads = generator._engine.tokenizer, []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda *a, **k: threads.append(threading.get_ident()) or decode(*a, **k))
    assert set(asyncio.run(generator.text_of((70,) * 200_000))) == {"d"}
    assert threads and threading.get_ident() not in threads


def test_an_adapter_that_goes_while_a_prompt_is_read_is_not_composed(generator, monkeypatch, tmp_path):
    engine = generator._engine
    engine.pool.add(random_adapter(build("llama"), "own"))
    generator._roster = Roster([StoredAdapter("own", "own", tmp_path, None)])
    encode = engine.encode

    def encode_meanwhile(*prompt, **how):
        generator._roster = Roster()
        engine.pool.remove("own")
        return encode(*prompt, **how)

    monkeypatch.setattr(engine, "encode", encode_meanwhile)
    asked = replace(order("x"), choice=Choice(None, None, None))
    weighed = Weighed({"own": 1.0}, {"own": 1.0}, "joint", None, 0.0, 0.0)
    assert dict(asyncio.run(generator.complete(asked, weighed)).begun.composition.weights) == {}


def test_of_a_long_prompt_of_token_ids_retrieval_gets_the_beginning_alone(generator):
    most = generator._settings.generation.max_prompt_tokens
    tokens = tuple(generator._engine.encode(LONG[:500])) * 1000
    text = asyncio.run(generator.text_of(tokens))
    assert len(tokens) > 100 * most and LONG.startswith(text[:500])
    assert text == generator._engine.tokenizer.decode(tokens[:most], skip_special_tokens=True)
