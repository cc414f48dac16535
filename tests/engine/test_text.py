"""Tokens become text while they come: pieces are the text, without half characters, cut at the first stop text."""

from dataclasses import replace

import pytest
from engine.families import random_adapter
from engine.listening import PATIENCE, Listener
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_language_model import tiny_tokenizer

from lorafleet.composition import Composition
from lorafleet.config import Models
from lorafleet.engine import GenerationRequest
from lorafleet.engine.text import HALF, TextStream
from lorafleet.models import load_tokenizer

SMOLLM2 = load_tokenizer(Models())
SAMPLES = [
    "Water boils at 100 °C – naïve, café, œuvre, Straße.",
    "北京的天气很好，我们去公园散步吧。龘靐齉",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 thumb, 🇩🇪, e\u0301 and 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "हिन्दी में लिखा हुआ, عربي, ภาษาไทย, Ελληνικά, 한국어",
    "def f(x):\n    return x\n\n\n# end\n\tif __name__ == '__main__':",
]


def whole(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True)


def writable(text):
    """The text as far as SmolLM2's tokenizer can write it: it has no tokens for some rare bytes."""
    return whole(SMOLLM2, SMOLLM2(text, add_special_tokens=False)["input_ids"]).replace(HALF, "")


texts = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from([*"aé京🙂 \n", "👩‍👧", "the ", "answer", "###", "\n\n", "龘"]), max_size=25).map("".join),
    st.sampled_from(SAMPLES),
).map(writable)


def streamed(tokenizer, tokens, stop=()):
    """The pieces of a text, up to where it stops."""
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in tokens:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    pieces.append(stream.end())
    assert "".join(pieces) == stream.text
    return pieces, stream


@settings(max_examples=150, deadline=None)
@given(text=texts)
@example(text=f"a real {HALF}, and one at the end: {HALF}")
def test_pieces_are_the_text_and_no_character_is_cut(text):
    tokens = SMOLLM2(text, add_special_tokens=False)["input_ids"]
    pieces, _ = streamed(SMOLLM2, tokens)
    assert "".join(pieces) == whole(SMOLLM2, tokens) == text
    assert HALF in text or not any(HALF in piece for piece in pieces)


@pytest.mark.parametrize("text", SAMPLES)
def test_text_goes_out_as_soon_as_it_is_whole(text):
    """A piece may lag behind by the character that is on its way, and no more."""
    tokens = SMOLLM2(text, add_special_tokens=False)["input_ids"]
    pieces, _ = streamed(SMOLLM2, tokens)
    for place in range(len(tokens)):
        assert "".join(pieces[: place + 1]) == whole(SMOLLM2, tokens[: place + 1]).rstrip(HALF)


@settings(max_examples=150, deadline=None)
@given(tokens=st.lists(st.integers(0, 258), max_size=30), number=st.integers(0, 1))
def test_pieces_are_the_text_of_any_tokens(tokens, number):
    """What a model gives need not be UTF-8."""
    tokenizer = (SMOLLM2, tiny_tokenizer())[number]
    pieces, _ = streamed(tokenizer, tokens)
    assert "".join(pieces) == whole(tokenizer, tokens)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), text=texts)
def test_the_text_is_cut_at_the_first_stop_text_and_shows_nothing_of_it(data, text):
    """The stop texts are pieces of the text, which lie across tokens, and texts that only begin like it."""

    stop = []
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, max(len(text) - 1, 0)))
        piece = text[start : start + data.draw(st.integers(1, 6))] + data.draw(st.sampled_from(["", "", "x", "\u0000"]))
        if piece:
            stop.append(piece)
    tokens = SMOLLM2(text, add_special_tokens=False)["input_ids"]
    pieces, stream = streamed(SMOLLM2, tokens, stop)
    known = [whole(SMOLLM2, tokens[:place]).rstrip(HALF) for place in range(1, len(tokens) + 1)]
    stopped = [one for one in known if any(end in one for end in stop)]
    wanted = stopped[0][: min(stopped[0].index(end) for end in stop if end in stopped[0])] if stopped else text
    assert "".join(pieces) == stream.text == wanted
    assert stream.stopped == bool(stopped)
    assert not any(end in wanted for end in stop)


def test_a_stop_text_over_several_tokens_never_shows():
    tokens = SMOLLM2("The answer is 42.\n\nQuestion: why?", add_special_tokens=False)["input_ids"]
    pieces, stream = streamed(SMOLLM2, tokens, ("\n\nQuestion", "never"))
    assert "".join(pieces) == "The answer is 42." and stream.stopped
    spread = [whole(SMOLLM2, [token]) for token in tokens]
    assert not any("\n\nQuestion" in one for one in spread), "it is more than one token"


def test_what_only_began_like_a_stop_text_is_given_in_the_end():
    tokens = SMOLLM2("1, 2, stop", add_special_tokens=False)["input_ids"]
    pieces, stream = streamed(SMOLLM2, tokens, (" stopped",))
    assert (pieces[-1], "".join(pieces), stream.stopped) == (" stop", "1, 2, stop", False)


@pytest.fixture
def engine(make_engine):
    engine = make_engine(rows=4)
    engine.pool.add(random_adapter(engine._composed.model, "own"))
    return engine


REQUESTS = [
    GenerationRequest(prompt, composition, max_tokens=40, temperature=temperature, seed=11)
    for prompt in ("Once upon a time", "Name three colours", "x")
    for composition in (Composition(), Composition("cat", {"own": 1.0}))
    for temperature in (0.0, 1.3)
]


def test_streaming_changes_nothing_about_the_answer(engine):
    plain = engine.generate(REQUESTS)
    listeners = [Listener() for _ in REQUESTS]
    futures = [engine.submit(request, listener) for request, listener in zip(REQUESTS, listeners, strict=True)]
    for answer, listener, future in zip(plain, listeners, futures, strict=True):
        heard = future.result(PATIENCE)
        assert (heard.text, heard.tokens, heard.finish_reason) == (answer.text, answer.tokens, answer.finish_reason)
        assert (listener.text, listener.tokens) == (answer.text, answer.tokens)
    for request, answer in zip(REQUESTS, plain, strict=True):
        pieces = list(engine.stream(request))
        assert "".join(piece.text for piece in pieces) == answer.text
        assert tuple(piece.choice.token for piece in pieces if piece.choice) == answer.tokens


def test_a_stop_text_ends_the_answer_while_others_go_on(engine):
    free = engine.generate(REQUESTS)
    stopping = []
    for request, answer in zip(REQUESTS, free, strict=True):
        place = next(place for place in range(3, len(answer.text) - 2) if HALF not in answer.text[place : place + 2])
        stopping.append(replace(request, stop=(answer.text[place : place + 2], "\u0000\u0000\u0000")))
    listeners = [Listener() for _ in stopping]
    futures = [engine.submit(request, listener) for request, listener in zip(stopping, listeners, strict=True)]
    for request, answer, listener, future in zip(stopping, free, listeners, futures, strict=True):
        stopped = future.result(PATIENCE)
        assert stopped.text == listener.text == answer.text[: answer.text.index(request.stop[0])]
        assert stopped.tokens == listener.tokens == answer.tokens[: len(stopped.tokens)]
        assert stopped.finish_reason == "stop" and len(stopped.tokens) < len(answer.tokens)
