"""Tokenize long texts only as far as their tokens are kept."""

from collections.abc import Callable

Encode = Callable[[str], list[int]]

CHARACTERS_A_TOKEN = 8
"""Most texts have fewer, so the first part is enough."""
GROWTH = 4
SPARE_TOKENS = 128
"""Next to a cut, tokens may differ from those of the whole text. WordPiece splits words of up to 100 letters."""


def read_ends(encode: Encode, text: str, first: int, last: int) -> tuple[list[int], bool]:
    """Tokenize a text, without the middle of a long one.

    Returns:
        All tokens and True, or False and the text's first tokens followed by its last ones: at least `first` and `last`, and
        SPARE_TOKENS of each beyond.
    """
    size = _first_size(max(first, last))
    while 2 * size < len(text):
        head, tail = encode(_opening(text, size)), encode(_closing(text, size))
        if len(head) >= first + SPARE_TOKENS and len(tail) >= last + SPARE_TOKENS:
            return head + tail, False
        size *= GROWTH
    return encode(text), True


def beginning(encode: Encode, text: str, tokens: int) -> str:
    """The beginning of a text that has the same first `tokens` tokens; the text itself where it is short."""
    size = _first_size(tokens)
    while size < len(text):
        part = _opening(text, size)
        if len(encode(part)) >= tokens + SPARE_TOKENS:
            return part
        size *= GROWTH
    return text


def _first_size(tokens: int) -> int:
    return CHARACTERS_A_TOKEN * (tokens + SPARE_TOKENS)


def _opening(text: str, size: int) -> str:
    """About `size` characters, up to a blank where there is one: tokens do not reach over it."""
    blank = text.rfind(" ", size * 3 // 4, size)
    return text[: blank if blank > 0 else size]


def _closing(text: str, size: int) -> str:
    start = len(text) - size
    blank = text.find(" ", start, start + size // 4)
    return text[blank if blank > 0 else start :]
