"""Tokens become text while they come: pieces are the text, without half characters, cut at the first stop text."""

import sys
from dataclasses import replace

import pytest
from engine.families import random_adapter
from engine.listening import PATIENCE, Listener
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_fleet import free_port, small_settings
from tiny_language_model import BOS, tiny_tokenizer

from lorafleet.composition import Composition
from lorafleet.config import Models
from lorafleet.engine import GenerationRequest
from lorafleet.engine.stops import StopMatcher
from lorafleet.engine.text import HALF, TextStream
from lorafleet.errors import RequestError
from lorafleet.fleet import Fleet
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
@given(tokens=st.lists(st.integers(0, 258), max_size=30), number=st.integers(0, 1), times=st.integers(1, 20))
def test_pieces_are_the_text_of_any_tokens(tokens, number, times):
    """What a model gives need not be UTF-8."""
    tokenizer = (SMOLLM2, tiny_tokenizer())[number]
    tokens = tokens * times
    pieces, _ = streamed(tokenizer, tokens)
    assert "".join(pieces) == whole(tokenizer, tokens)


@pytest.mark.parametrize("text", [HALF, f"a{HALF}", f"{HALF}京{HALF}"])
def test_marks_of_unfinished_characters_cost_no_more_the_more_of_them_there_are(text, monkeypatch):
    decoded = []
    decode = TextStream._decode
    monkeypatch.setattr(TextStream, "_decode", lambda self, tokens: decoded.append(len(tokens)) or decode(self, tokens))
    costs = []
    for times in (250, 500):
        decoded.clear()
        tokens = SMOLLM2(text * times, add_special_tokens=False)["input_ids"]
        pieces, _ = streamed(SMOLLM2, tokens)
        assert "".join(pieces) == whole(SMOLLM2, tokens) == text * times
        costs.append(sum(decoded))
    assert costs[1] < 2.5 * costs[0]


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


MARKED = SMOLLM2("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|endoftext|>")["input_ids"]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), tokens=st.lists(st.sampled_from([0, 1, 2, *sorted(set(MARKED))]), max_size=25))
def test_a_stop_text_that_names_special_tokens_is_met_where_they_come(data, tokens):
    """Stop texts are pieces of the text as it is with its special tokens; the answer is cut in the text without them."""
    marked, shown = "", []
    for token in tokens:
        text = SMOLLM2.decode([token])
        marked += text
        shown += [bool(whole(SMOLLM2, [token]))] * len(text)
    stop = []
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, max(len(marked) - 1, 0)))
        stop.append(marked[start : start + data.draw(st.integers(1, 25))] + data.draw(st.sampled_from(["", "", "x"])))
    stop = [one for one in stop if one] or ["x"]

    wanted, length = None, 0
    for token in tokens:
        length += len(SMOLLM2.decode([token]))
        plain = "".join(character for character, visible in zip(marked[:length], shown, strict=False) if visible)
        cuts = [plain.index(end) for end in stop if end in plain]
        specials = [end for end in stop if any(text in end for text in SMOLLM2.all_special_tokens)]
        cuts += [sum(shown[: marked[:length].index(end)]) for end in specials if end in marked[:length]]
        if cuts:
            wanted = plain[: min(cuts)]
            break
    pieces, stream = streamed(SMOLLM2, tokens, stop)
    assert stream.stopped == (wanted is not None)
    assert "".join(pieces) == (whole(SMOLLM2, tokens) if wanted is None else wanted)


@pytest.mark.parametrize(
    ("stop", "left"),
    [
        ("<|im_start|>", "user\nHi\n"),
        ("\n<|im_start|>assistant", "user\nHi"),
        ("<|im_end|>", "user\nHi"),
        ("Hi<|im_end|>", "user\n"),
        ("ant\nHello", "user\nHi\nassist"),
        ("Hi\na", "user\n"),
        ("<|im_end|>user", None),
    ],
)
def test_where_a_stop_text_cuts_a_conversation(stop, left):
    pieces, stream = streamed(SMOLLM2, MARKED[1:], (stop,))
    assert "".join(pieces) == (whole(SMOLLM2, MARKED) if left is None else left)
    assert stream.stopped == (left is not None)


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.text("ab", max_size=9), max_size=12), stop=st.lists(st.text("ab", min_size=1, max_size=7), max_size=3)
)
def test_stop_texts_that_overlap_themselves_are_found_where_a_search_finds_them(parts, stop):
    matcher, text = StopMatcher(stop), ""
    for part in parts:
        text += part
        found = matcher.feed(part)
        assert found == min((text.index(end) for end in stop if end in text), default=None)
        if found is not None:
            break
        begun = [length for end in stop for length in range(len(end)) if text.endswith(end[:length])]
        assert matcher.held == max(begun, default=0)


def lines_run(do):
    """How many lines of the package's code run while `do` does."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if "lorafleet" not in frame.f_code.co_filename:
            return None
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        do()
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize(
    "stop",
    [
        ("never met, " * 90,) * 4,
        ("a" * 999 + "b",) * 4,
        (("a" * 9 + "b") * 99 + "c",) * 4,
        ("<|im_end|>" + "a" * 900 + "<|im_end|>",) * 4,
    ],
)
def test_long_stop_texts_cost_no_more_than_short_ones(stop):
    tokens = SMOLLM2("aaaaaaaaab" * 200 + "a" * 1500 + "c", add_special_tokens=False)["input_ids"]
    short, long = (TextStream(SMOLLM2, texts) for texts in (("xy",) * 4, stop))
    costs = [lines_run(lambda stream=stream: list(map(stream.add, tokens))) for stream in (short, long)]
    assert not short.stopped and not long.stopped
    assert costs[1] < 3 * costs[0]


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


def test_a_special_token_stops_the_answer_by_its_id_while_others_go_on(engine):
    """Drawn at a high temperature, some answers of a random model have the token `<s>`, which no text shows."""
    asked = [GenerationRequest("x", max_tokens=60, temperature=2.0, seed=seed) for seed in range(24)]
    free = engine.generate(asked)
    listeners = [Listener() for _ in asked]
    stopping = [replace(request, stop=("<s>",)) for request in asked]
    futures = [engine.submit(request, listener) for request, listener in zip(stopping, listeners, strict=True)]
    stopped = 0
    for answer, future, listener in zip(free, futures, listeners, strict=True):
        given = future.result(PATIENCE)
        met = 1 + answer.tokens.index(BOS) if BOS in answer.tokens else len(answer.tokens)
        assert given.tokens == listener.tokens == answer.tokens[:met]
        assert (
            given.text == listener.text == whole(tiny_tokenizer(), answer.tokens[:met]).rstrip(HALF * (BOS in answer.tokens))
        )
        assert given.finish_reason == ("stop" if BOS in answer.tokens else "length")
        stopped += BOS in answer.tokens
    assert 0 < stopped < len(asked)


def test_a_stop_text_that_is_too_long_is_named(engine):
    with pytest.raises(RequestError, match=r"stop\.1 has 1001 characters.*1000") as caught:
        engine.submit(GenerationRequest("x", stop=("fine", "x" * 1001)))
    assert caught.value.field == "stop.1"
    assert engine.generate([GenerationRequest("x", max_tokens=2, stop=("x" * 1000,))])


def test_a_fleet_takes_stop_texts(tmp_path):
    fleet = Fleet(small_settings(tmp_path, free_port()))
    asked = {"prompts": ["Once upon a time", "Name three colours", "x", "7"], "weights": [{}] * 4, "max_tokens": 40}
    free = fleet.generate(**asked)
    number, stop = next((number, one) for number, answer in enumerate(free) for one in answer.text[1:] if one != HALF)
    stopped = fleet.generate(**asked, stop=[stop])[number]
    fleet.engine.close()
    assert (stopped.text, stopped.finish_reason) == (free[number].text.partition(stop)[0], "stop")
