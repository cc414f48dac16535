"""The tokens of an answer as texts, given out once their own text is certain."""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorafleet.engine import Generation, Piece, TokenChoice, ToldPrompt
from lorafleet.engine.text import HALF, TextStream
from serve.messages import Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Transcript:
    """Follows an answer piece by piece. What a stop text takes away of it, its tokens among it, is never given out."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._held: deque[Token] = deque()
        self._last: int | None = None
        # How long the echoed prompt is, and how much of it and of the answer is certain.
        self._before = self._given = 0

    def hear(self, piece: Piece) -> tuple[Token, ...]:
        """Take a piece, and give the tokens that have become certain."""
        if piece.choice is not None:
            self._held.append(self._token(piece.choice, self._before + piece.start))
        self._given += len(piece.text)
        certain = []
        while self._held and self._held[0].start < self._given:
            certain.append(self._held.popleft())
        return tuple(certain)

    def echo(self, prompt: ToldPrompt) -> tuple[Token, ...]:
        """The tokens of the prompt; those of the answer begin behind them."""
        stream = TextStream(self._tokenizer)
        tokens = [Token(self._text(prompt.first), 0, None)]
        self._last = prompt.first
        stream.add(prompt.first)
        for choice in prompt.choices:
            tokens.append(self._token(choice, len(stream.text)))
            stream.add(choice.token)
        stream.end()
        self._before = self._given = len(stream.text)
        return tuple(tokens)

    def _token(self, choice: TokenChoice, start: int) -> Token:
        alternatives = tuple((self._text(token), value) for token, value in choice.likeliest)
        token = Token(self._text(choice.token), start, choice.log_probability, alternatives)
        self._last = choice.token
        return token

    def _text(self, token: int) -> str:
        return token_text(self._tokenizer, self._last, token)


async def transcribe(
    tokenizer: "PreTrainedTokenizerBase", answers: Sequence[Generation], heard: Sequence[Sequence[Piece]]
) -> list[tuple[Token, ...]]:
    """Write the tokens of whole answers as texts, after those of their prompts where they are wanted.

    Twenty alternatives to each token of sixteen answers are 170,000 texts: they are written off the event loop, and one
    answer after the other, so that a request which is called off stops between two.
    """

    def told(answer: Generation, pieces: Sequence[Piece]) -> tuple[Token, ...]:
        transcript = Transcript(tokenizer)
        prompt = transcript.echo(answer.prompt) if answer.prompt else ()
        return (*prompt, *(token for piece in pieces for token in transcript.hear(piece)))

    return [await asyncio.to_thread(told, answer, pieces) for answer, pieces in zip(answers, heard, strict=True)]


def token_text(tokenizer: "PreTrainedTokenizerBase", before: int | None, token: int) -> str:
    """What a token adds behind another one: a tokenizer may write it otherwise where it begins a text.

    A part of a character is written as a replacement character.
    """

    def decoded(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens)))

    alone = decoded([token])
    if before is None or HALF in alone:
        return alone
    lead, both = decoded([before]), decoded([before, token])
    return both[len(lead) :] if both.startswith(lead) else alone
