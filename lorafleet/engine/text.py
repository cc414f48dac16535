"""Tokens to text while they come: no half characters, and nothing of a stop text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorafleet.engine.stops import StopMatcher, naming_specials, special_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HALF = "\N{REPLACEMENT CHARACTER}"
MOST_HALVES = 3
"""An unfinished character has at most so many bytes, and a tokenizer writes one mark for all of them, or one for each."""
LONGEST_RUN = 64
"""Tokens without an end of a character that is certain: models may write the mark itself, over and over."""


class TextStream:
    """The text of an answer, token by token. Special tokens are no part of it.

    Args:
        stop: texts that end the answer; the answer does not hold them. One that names a special token, alone or among
            other text, is met where the token itself comes.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = StopMatcher(stop)
        naming = naming_specials(tokenizer, tuple(stop)) if stop else ()
        self._specials = special_texts(tokenizer) if naming else {}
        self._marked = StopMatcher(naming)
        # For every character of the text with its special tokens: how many characters of the text stand before it.
        self._places: list[int] = []
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
        start, news = len(self._text), self._news()
        self._text += news
        cuts = [self._stops.feed(news)]
        if self._specials:
            cuts.append(self._feed_marked(start, news, self._specials.get(token, "")))
        found = [cut for cut in cuts if cut is not None]
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
            if (len(self._tokens) - self._read) % LONGEST_RUN == 0:
                self._shorten(now)
        else:
            self._anchor, self._read = self._read, len(self._tokens)
            self._known = len(self._decode(self._tokens[self._anchor :]))
        return news

    def _shorten(self, now: str) -> None:
        """Decode a long run of marks no more from its beginning: only its last tokens may be an unfinished character."""
        cut = len(self._tokens) - MOST_HALVES - 1
        behind = self._decode(self._tokens[cut:])
        before = len(now) - len(behind)
        # Not within a character, which both sides together would finish.
        if behind and before <= self._known and self._decode(self._tokens[self._anchor : cut]) + behind == now:
            self._anchor = self._read = cut
            self._known -= before

    def _feed_marked(self, start: int, news: str, special: str) -> int | None:
        """The position at which a stop text that names special tokens cuts the text."""
        end = start + len(news)
        self._places += [*range(start, end), *[end] * len(special)]
        found = self._marked.feed(news + special)
        return None if found is None else self._places[found]

    def _held_back(self) -> int:
        """The number of characters at the end that may begin a stop text."""
        marked = len(self._text) - self._places[-self._marked.held] if self._marked.held else 0
        return max(self._stops.held, marked)

    def _give(self, end: int) -> str:
        given, self._given = self._text[self._given : end], max(self._given, end)
        return given

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        assert isinstance(text, str)
        return text
