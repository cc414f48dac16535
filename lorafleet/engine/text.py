"""Tokens to text while they come: no half characters, and nothing of a stop text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HALF = "\N{REPLACEMENT CHARACTER}"
MOST_HALVES = 3
"""An unfinished character has at most so many bytes, and a tokenizer writes one mark for all of them, or one for each."""


class TextStream:
    """The text of an answer, token by token.

    Args:
        stop: texts that end the answer; the answer does not hold them.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        # The tokens from `_anchor` on are decoded again with every new one, since a tokenizer may write a token otherwise at
        # the beginning of a text; `_known` characters of what they say are in the text already. `_anchor` and `_read` lie
        # between two characters.
        self._anchor = self._read = self._known = 0
        self._text = ""
        self._given = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """What is known of the answer."""
        return self._text

    def add(self, token: int) -> str:
        """Take a token, and give the text that is certain now; `stopped` tells whether a stop text has come."""
        self._tokens.append(token)
        self._text += self._news()
        found = [self._text.find(stop) for stop in self._stop if stop in self._text]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True
            return self._give(len(self._text))
        return self._give(len(self._text) - self._held_back())

    def end(self) -> str:
        """The rest of the text, where no more tokens come."""
        if not self.stopped:
            self._text += self._news(whole=True)
        return self._give(len(self._text))

    def _news(self, whole: bool = False) -> str:
        now = self._decode(self._tokens[self._anchor :])
        halves = 0 if whole else min(len(now) - len(now.rstrip(HALF)), MOST_HALVES)
        news = now[self._known : len(now) - halves]
        if halves:
            self._known = max(self._known, len(now) - halves)
        else:
            self._anchor, self._read = self._read, len(self._tokens)
            self._known = len(self._decode(self._tokens[self._anchor :]))
        return news

    def _held_back(self) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-length:]) for stop in self._stop):
                return length
        return 0

    def _give(self, end: int) -> str:
        given, self._given = self._text[self._given : end], max(self._given, end)
        return given

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        assert isinstance(text, str)
        return text
