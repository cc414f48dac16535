"""Tokens as texts, and the engine's answers in an event loop, on a tiny model with bytes for tokens."""

import asyncio
import threading
import time
from collections import Counter

import pytest
from engine.families import NEVER, build
from tiny_language_model import tiny_tokenizer

from lorafleet.engine import Engine, Generation, GenerationRequest, Piece, TokenChoice
from lorafleet.engine.text import HALF, TextStream
from lorafleet.errors import EngineFull
from serve.answering import Answering
from serve.answers import json_response, utf8
from serve.generator import generate
from serve.protocol.responses import Health
from serve.transcript import Transcript, token_text, transcribe

TOKENIZER = tiny_tokenizer(adds_bos=False)


@pytest.fixture
def engine():
    engine = Engine(build("llama", eos_token_id=NEVER), TOKENIZER, rows=4, longest=1000, waiting=4)
    yield engine
    assert (engine.running, engine.waiting) == (0, 0)
    engine.close()


def told(text: str, stop: tuple[str, ...] = ()) -> tuple[str, list]:
    """An answer that says `text` byte by byte, and the tokens that a transcript gives out."""
    stream, transcript, said, tokens = TextStream(TOKENIZER, stop), Transcript(TOKENIZER), "", []
    for token in TOKENIZER(text)["input_ids"]:
        start = len(stream.text)
        piece = Piece(stream.add(token), TokenChoice(token, -1.0), start)
        said += piece.text
        tokens += transcript.hear(piece)
        assert all(token.start < len(said) for token in tokens), "nothing is told before its text is certain"
        if stream.stopped:
            return said, tokens
    rest = Piece(stream.end())
    return said + rest.text, [*tokens, *transcript.hear(rest)]


@pytest.mark.parametrize("text", ["plain", "naïve café", "sea 🌊 and 雨", ""])
def test_every_byte_of_an_answer_is_told_where_its_character_begins(text):
    said, tokens = told(text)
    assert said == text
    lengths = [len(character.encode()) for character in text]
    assert [token.start for token in tokens] == [place for place, length in enumerate(lengths) for _ in range(length)]
    whole = [token.text for token in tokens if HALF not in token.text]
    assert whole == [character for character, length in zip(text, lengths, strict=True) if length == 1]


@pytest.mark.parametrize(("stop", "left"), [("and", "sea 🌊 "), ("🌊", "sea "), ("sea", ""), ("wind", "sea 🌊 and 雨")])
def test_what_a_stop_text_takes_away_is_not_told(stop, left):
    said, tokens = told("sea 🌊 and 雨", (stop,))
    assert said == left
    assert len(tokens) == len(left.encode())


def test_parts_of_characters_have_no_utf8_of_their_own():
    assert utf8("é") == [0xC3, 0xA9]
    assert utf8(HALF) is None
    first, second = TOKENIZER("é")["input_ids"]
    assert token_text(TOKENIZER, first, second) == HALF


def test_answers_come_piece_by_piece_and_together_are_the_whole(engine):
    requests = [GenerationRequest(f"{n}", max_tokens=5 + n, temperature=1.0, seed=n, stop=("e",)) for n in range(3)]

    async def hear() -> tuple[list[str], dict[int, Generation]]:
        texts, ends = [""] * 3, {}
        async for batch in Answering(engine, requests):
            for number, what in batch:
                assert number not in ends, "nothing comes behind an end"
                if isinstance(what, Generation):
                    ends[number] = what
                else:
                    texts[number] += what.text
        return texts, ends

    texts, ends = asyncio.run(hear())
    whole = engine.generate(requests)
    assert texts == [ends[number].text for number in range(3)] == [answer.text for answer in whole]


class Watched:
    """A tokenizer that notes which thread writes its texts."""

    def __init__(self):
        self.threads = Counter()

    def decode(self, tokens, **how):
        self.threads[threading.get_ident()] += 1
        return TOKENIZER.decode(tokens, **how)


def test_alternatives_are_written_off_the_event_loop_and_one_answer_after_the_other(engine):
    heard, tokenizer = [[] for _ in range(4)], Watched()
    asked = [GenerationRequest("x", max_tokens=30, temperature=1.0, likeliest=20, tell_prompt=True) for _ in heard]

    async def drive():
        answers = await generate(engine, asked, [pieces.append for pieces in heard])
        loop, dumped = threading.get_ident(), []
        whole = await transcribe(tokenizer, answers, heard)
        assert loop not in tokenizer.threads and tokenizer.threads.total() > 4 * 30 * 20
        assert [len(tokens) for tokens in whole] == [31] * 4
        # Whoever gives up while the first answer is written does not have the others written.
        tokenizer.threads.clear()
        telling = asyncio.create_task(transcribe(tokenizer, answers, heard))
        while not tokenizer.threads:
            await asyncio.sleep(0)
        telling.cancel()
        await asyncio.wait([telling])
        await asyncio.to_thread(time.sleep, 0.3)
        assert tokenizer.threads.total() < 2 * 30 * 20 * 3

        def answer():
            dumped.append(threading.get_ident())
            return Health()

        assert [(await json_response(answer, large)).body for large in (True, False)] == [b'{"status":"ok"}'] * 2
        assert dumped[0] != loop == dumped[1]

    asyncio.run(drive())


def test_all_requests_are_taken_or_none_and_to_cancel_frees_them(engine):
    async def ask(n: int) -> None:
        answering = Answering(engine, [GenerationRequest("x", max_tokens=900)] * n)
        async for _ in answering:
            break
        answering.cancel()

    async def drive() -> None:
        await ask(4)
        while engine.running or engine.waiting:
            await asyncio.sleep(0.001)
        with pytest.raises(EngineFull):
            await ask(40)
        while engine.running or engine.waiting:
            await asyncio.sleep(0.001)

    asyncio.run(drive())
