"""What an answer is worth."""

import re
import string
from collections.abc import Iterable, Sequence

from lorafleet.engine import OptionScore

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def best_option(scores: Sequence[OptionScore], scoring: str) -> str:
    """The likeliest option by sum, per token or per byte."""
    return max(scores, key=lambda score: score.by(scoring)).option


def exact_match(answer: str, accepted: Iterable[str]) -> bool:
    """Whether an answer is one of the accepted ones, but for case, articles, punctuation and blanks (SQuAD's rule)."""
    return _plain(answer) in {_plain(text) for text in accepted}


def _plain(text: str) -> str:
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())
