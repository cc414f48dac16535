"""What an answer is worth."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

from lorafleet.engine import OptionScore

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def best_option(scores: Sequence[OptionScore], scoring: str) -> int:
    """The place of the likeliest option by sum, per token or per byte; the first of equals."""
    values = [score.by(scoring) for score in scores]
    return values.index(max(values))


def exact_match(answer: str, accepted: Iterable[str]) -> bool:
    """Whether an answer is one of the accepted ones, but for case, articles, punctuation and blanks (SQuAD's rule)."""
    return _plain(answer) in {_plain(text) for text in accepted}


def f1(answer: str, accepted: Iterable[str]) -> float:
    """The harmonic mean of precision and recall of an answer's words, against the accepted answer that it meets best."""
    return max((_word_f1(_plain(answer).split(), _plain(text).split()) for text in accepted), default=0.0)


def _word_f1(given: Sequence[str], wanted: Sequence[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    common = (Counter(given) & Counter(wanted)).total()
    return 2 * common / (len(given) + len(wanted))


def _plain(text: str) -> str:
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())
