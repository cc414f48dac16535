"""The adapters in storage, and the names by which requests may call them."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter

from lorafleet.composition.files import CONFIG_FILE, WEIGHTS_FILE
from lorafleet.composition.peft_format import read_config, read_layers
from lorafleet.config import Settings
from lorafleet.errors import UnknownAdapter, closest
from lorafleet.models import fingerprint
from lorafleet.storage import read_json, write_json
from lorafleet.training.cards import AdapterCard, adapter_name, read_card

RECORD = "added.json"


@dataclass(frozen=True)
class AddedRecord:
    """How an adapter came in while the endpoint was running. It lies beside the weights.

    Attributes:
        name: the name of its folder.
        rows: rows of the index that came with it, and go with it.
        base_fingerprint: of the fleet's base model, which its shapes fit.
        date: when it came, ISO 8601, UTC.
    """

    name: str
    task: str
    family: str | None
    rows: int
    base_fingerprint: str
    date: str

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)


_RECORD = TypeAdapter(AddedRecord)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter's folder.

    Attributes:
        name: the folder's name, `<base>-<task>-<rank>` where LoRAFleet trained it.
        task: what the adapter is called in weights: its record's or card's task, or its name where there is neither.
        card: None for an adapter that other tools have made.
        added: None for an adapter that did not come in through the endpoint.
        stamp: another one for other weights under the same name.
    """

    name: str
    task: str
    folder: Path
    card: AdapterCard | None
    added: AddedRecord | None = None
    stamp: str = ""

    @property
    def family(self) -> str | None:
        """The family of its task, where it is known."""
        return self.card.family if self.card else self.added.family if self.added else None

    @property
    def rows(self) -> int | None:
        """The rows that it was trained on or came with, where that is known."""
        return self.added.rows if self.added else self.card.rows if self.card else None

    @property
    def origin(self) -> Literal["trained", "added"]:
        """Whether it was trained here, or came from elsewhere."""
        return "trained" if self.card and not self.added else "added"

    @property
    def created(self) -> int:
        """Unix time of its record or card; 0 where both are missing, or their date is no date."""
        described = self.added or self.card
        with suppress(ValueError, OverflowError):
            return int(datetime.fromisoformat(described.date).timestamp()) if described else 0
        return 0

    @property
    def same_weights(self) -> tuple[str, str]:
        """Equal where two adapters of one task are the same one."""
        return self.name, self.stamp


@dataclass(frozen=True)
class AdapterShape:
    """What an adapter's own files say.

    Attributes:
        rank: the largest of any layer.
        modules: the kinds of layers that it changes, e.g. `q_proj`.
        base: the base model as its configuration names it.
    """

    rank: int
    alpha: float
    modules: tuple[str, ...]
    base: str


class Roster:
    """The adapters of a fleet, one a task."""

    def __init__(self, adapters: Iterable[StoredAdapter] = ()) -> None:
        self._adapters = {adapter.task: adapter for adapter in adapters}
        self._tasks = {adapter.name: adapter.task for adapter in self._adapters.values()} | {t: t for t in self._adapters}

    @property
    def adapters(self) -> Mapping[str, StoredAdapter]:
        """By task."""
        return self._adapters

    def task_of(self, name: str) -> str:
        """The task of an adapter that is called by its name or by its task.

        Raises:
            UnknownAdapter: there is none.
        """
        if name not in self._tasks:
            mend = closest(name, self._tasks) if self._tasks else "Train some first: lorafleet train"
            raise UnknownAdapter(f"no adapter named {name!r}", mend)
        return self._tasks[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tasks

    def having(self, adapter: StoredAdapter) -> "Roster":
        """The same with another adapter, which takes the place of its task's."""
        return Roster((self._adapters | {adapter.task: adapter}).values())

    def without(self, task: str) -> "Roster":
        """The same without the adapter of a task."""
        return Roster(adapter for adapter in self._adapters.values() if adapter.task != task)


def stored_adapters(settings: Settings) -> Roster:
    """The adapters in `settings.adapters` that belong to the base model of the settings.

    Where a task has several (of different ranks), the one that the training settings name is taken, else the newest.
    """
    base = fingerprint(settings.models.base, settings.models.base_revision)
    found: dict[str, StoredAdapter] = {}
    configs = [path for path in settings.adapters.glob(f"*/{CONFIG_FILE}") if not path.parent.name.startswith(".")]
    for folder in (path.parent for path in sorted(configs, key=_modified)):
        try:
            adapter = stored_adapter(folder)
        except FileNotFoundError:
            continue
        if not folder.is_dir():
            continue
        described = adapter.added or adapter.card
        if described is not None and described.base_fingerprint != base:
            continue
        preferred = found.get(adapter.task)
        if preferred is None or preferred.name != adapter_name(settings, adapter.task):
            found[adapter.task] = adapter
    return Roster(sorted(found.values(), key=lambda adapter: adapter.task))


def _modified(path: Path) -> float:
    """The time of a file's last change; 0 where it has been removed meanwhile."""
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0


def stored_adapter(folder: Path) -> StoredAdapter:
    """The adapter in a folder, with what lies beside it."""
    card, added = read_card(folder), read_record(folder)
    described = added or card
    weights = folder / WEIGHTS_FILE
    stamp = f"{weights.stat().st_mtime_ns}-{weights.stat().st_size}" if weights.is_file() else ""
    name = added.name if added else folder.name
    return StoredAdapter(name, described.task if described else folder.name, folder, card, added, stamp)


def read_record(folder: Path) -> AddedRecord | None:
    """How the adapter in a folder came in; None where it was trained here, or laid there by hand."""
    try:
        return _RECORD.validate_json(json.dumps(read_json(folder / RECORD)))
    except ValueError:
        return None


def write_record(folder: Path, record: AddedRecord) -> None:
    """Put the record beside the weights."""
    write_json(folder / RECORD, asdict(record))


def adapter_shape(adapter: StoredAdapter) -> AdapterShape:
    """What an adapter's files say; nothing is loaded but the headers.

    Raises:
        AdapterError: a file is gone or damaged, or the adapter is not plain LoRA.
    """
    return _shape(adapter.folder, adapter.stamp)


@lru_cache(maxsize=1024)
def _shape(folder: Path, stamp: str) -> AdapterShape:
    config, layers = read_config(folder, folder.name), read_layers(folder, folder.name)
    return AdapterShape(
        rank=max(layer.rank for layer in layers.values()),
        alpha=config.lora_alpha,
        modules=tuple(sorted({module.rpartition(".")[2] for module in layers})),
        base=config.base_model_name_or_path or "",
    )
