"""How fast adapters are trained here: by the cards of earlier ones, or by a few steps on the clock."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from pathlib import Path

from lorafleet.config import Settings
from lorafleet.models import fingerprint
from lorafleet.tasks import Corpus
from lorafleet.training.adapter import train_adapter
from lorafleet.training.backends import choose_backend
from lorafleet.training.cards import AdapterCard, read_card

TIMED_STEPS = 4


@dataclass(frozen=True)
class Speed:
    """Tokens that a worker trains on in a second, and what that was taken from."""

    tokens_per_second: float
    source: str


def speed_of_cards(settings: Settings) -> Speed | None:
    """The mean speed at which the adapters in place were trained on this base model; None where there are none."""
    base = fingerprint(settings.models.base, settings.models.base_revision)
    folders = sorted(settings.adapters.iterdir()) if settings.adapters.is_dir() else []
    cards = [card for card in map(read_card, folders) if card is not None and _timed(card, base)]
    if not cards:
        return None
    seconds = sum(card.seconds for card in cards)
    return Speed(sum(card.tokens for card in cards) / seconds, f"the cards of {len(cards)} earlier adapters")


def timed_speed(settings: Settings, corpus: Corpus) -> Speed:
    """Train an adapter on a few batches of `corpus`, in a folder that is thrown away, and time all steps but the first."""
    brief = {"max_steps": TIMED_STEPS, "checkpoint_steps": 0, "tracking": "none"}
    tried = settings.model_copy(update={"training": settings.training.model_copy(update=brief)})
    model, tokenizer = choose_backend(tried).load(tried)
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        card = train_adapter(
            model, tokenizer, corpus, tried, "timed", Path(folder) / "timed", lambda *_: ends.append(time.monotonic())
        )
    seconds = (ends[-1] - ends[0]) / (TIMED_STEPS - 1)
    return Speed(card.tokens / TIMED_STEPS / seconds, f"{TIMED_STEPS - 1} steps of {corpus.name} on the clock")


def expected_seconds(tokens: Sequence[int], speed: Speed, at_once: int) -> float:
    """How long adapters of so many tokens take, `at_once` of them trained at a time, each taken up when a place is free."""
    ends = [0.0] * max(1, at_once)
    heapify(ends)
    for count in tokens:
        heapreplace(ends, ends[0] + count / speed.tokens_per_second)
    return max(ends)


def _timed(card: AdapterCard, base: str) -> bool:
    return card.base_fingerprint == base and card.seconds > 0 and card.tokens > 0
