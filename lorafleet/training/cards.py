"""The card of an adapter: what it was trained on, how, and with what outcome. It lies beside the weights."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from lorafleet import models
from lorafleet.composition.files import WEIGHTS_FILE
from lorafleet.config import Settings, Training
from lorafleet.storage import read_json, write_json
from lorafleet.tasks import Corpus

CARD = "card.json"
# What says where and how fast an adapter is trained, not what it learns.
PLACEMENT = {
    "workers",
    "workers_per_adapter",
    "gpus_per_worker",
    "cpus_per_worker",
    "worker_failures",
    "backend",
    "gradient_checkpointing",
    "cuda_graphs",
    "checkpoint_steps",
    "tracking",
}


@dataclass(frozen=True)
class AdapterCard:
    """What there is to know about an adapter.

    Attributes:
        name: the name of its folder.
        corpus: the fingerprint of the rows.
        source: where the rows came from, for people.
        rows: rows that it was trained on; cut_rows of them had a prompt longer than `training.max_tokens`.
        training: all settings of the section `training`.
        base: the base model as the settings name it, and its fingerprint in base_fingerprint.
        backend: which backend trained it, and why that one.
        steps: optimiser steps; tokens that they saw in tokens, padding not counted.
        first_loss: mean loss per answer token over a fixed sample of the rows before the first step.
        last_loss: the same after the last step.
        seconds: from wrapping the base model to the saved weights.
        versions: of torch, transformers and peft.
        date: when it was done, ISO 8601, UTC.
        losses: mean loss per answer token of every step's batch.
        resumed: the steps that a checkpoint was gone on from after another process had been stopped; mostly none.
    """

    name: str
    task: str
    family: str
    corpus: str
    source: str
    rows: int
    cut_rows: int
    training: dict[str, Any]
    base: str
    base_fingerprint: str
    backend: str
    steps: int
    first_loss: float
    last_loss: float
    seconds: float
    tokens: int
    versions: dict[str, str]
    date: str
    losses: list[float] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)


_CARD = TypeAdapter(AdapterCard)


def adapter_name(settings: Settings, task: str) -> str:
    """The name of the adapter of a task: `<base>-<task>-<rank>`."""
    return f"{models.short_name(settings.models.base)}-{task}-{settings.training.rank}"


def write_card(folder: Path, card: AdapterCard) -> None:
    """Put the card beside the weights."""
    write_json(folder / CARD, asdict(card))


def read_card(folder: Path) -> AdapterCard | None:
    """The card of the adapter in `folder`; None where there is no adapter, or its card is of another kind."""
    if not (folder / WEIGHTS_FILE).is_file():
        return None
    try:
        # Cards are listed over HTTP as they are, where numbers are finite.
        return _CARD.validate_json(json.dumps(read_json(folder / CARD), allow_nan=False))
    except ValueError:
        return None


def is_current(card: AdapterCard, corpus: Corpus, settings: Settings) -> bool:
    """Whether training again would give the same adapter: same rows, same base model, same recipe."""
    return (
        card.corpus == corpus.fingerprint
        and card.base_fingerprint == models.fingerprint(settings.models.base, settings.models.base_revision)
        and _recipe(card.training) == _recipe(recorded(settings.training))
    )


def training_fingerprint(corpus: Corpus, settings: Settings, backend: str) -> str:
    """A digest of rows, base model, recipe and backend: checkpoints with the same one lead to the same adapter."""
    base = models.fingerprint(settings.models.base, settings.models.base_revision)
    parts = [corpus.fingerprint, base, _recipe(recorded(settings.training)), backend]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def recorded(training: Training) -> dict[str, Any]:
    """The training settings as a card records them."""
    return training.model_dump(mode="json")


def _recipe(training: dict[str, Any]) -> dict[str, Any]:
    """What decides what an adapter learns; of a setting that a card is older than, the default."""
    recipe = recorded(Training()) | training
    return {key: value for key, value in recipe.items() if key not in PLACEMENT}
