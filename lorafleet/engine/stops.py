"""Find stop texts in a text that arrives in parts."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopMatcher:
    """Finds the first stop text by Knuth, Morris and Pratt: a character costs the same however long the stop texts are."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(self._stops)
        self._read = 0

    @property
    def held(self) -> int:
        """The number of characters at the end that may begin a stop text."""
        return max(self._matched, default=0)

    def feed(self, text: str) -> int | None:
        """Read the next part of the text.

        Returns:
            The start of the first stop text among those that end in this part; None where none ends.
        """
        starts = []
        for number, (stop, borders) in enumerate(self._stops):
            matched = self._matched[number]
            for place, character in enumerate(text, self._read + 1):
                while matched and stop[matched] != character:
                    matched = borders[matched - 1]
                matched += stop[matched] == character
                if matched == len(stop):
                    starts.append(place - matched)
                    break
            self._matched[number] = matched
        self._read += len(text)
        return min(starts, default=None)


@lru_cache(8)
def special_texts(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    """The special tokens by id: decoding leaves them out of a text."""
    added = tokenizer.added_tokens_decoder
    ids = {token for token, one in added.items() if one.special} | set(tokenizer.all_special_ids)
    return {token: str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(ids)}


@lru_cache(64)
def naming_specials(tokenizer: "PreTrainedTokenizerBase", stops: tuple[str, ...]) -> tuple[str, ...]:
    """The stop texts that contain the text of a special token."""
    texts = set(special_texts(tokenizer).values())
    return tuple(stop for stop in stops if any(text in stop for text in texts))


@lru_cache(64)
def _borders(stop: str) -> list[int]:
    """For every beginning of `stop`: the length of its longest proper beginning that is its end, too."""
    borders, matched = [0], 0
    for character in stop[1:]:
        while matched and stop[matched] != character:
            matched = borders[matched - 1]
        matched += stop[matched] == character
        borders.append(matched)
    return borders
