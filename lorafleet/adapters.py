"""The adapters in storage, and the names by which requests may call them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Literal

from safetensors import safe_open

from lorafleet.composition.files import CONFIG_FILE, WEIGHTS_FILE
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
        """Unix time of its record or card; 0 where it has neither."""
        described = self.added or self.card
        return int(datetime.fromisoformat(described.date).timestamp()) if described else 0

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
    folders = sorted(settings.adapters.glob(f"*/{CONFIG_FILE}"), key=lambda path: path.stat().st_mtime)
    for folder in (path.parent for path in folders):
        adapter = stored_adapter(folder)
        described = adapter.added or adapter.card
        if folder.name.startswith(".") or (described is not None and described.base_fingerprint != base):
            continue
        preferred = found.get(adapter.task)
        if preferred is None or preferred.name != adapter_name(settings, adapter.task):
            found[adapter.task] = adapter
    return Roster(sorted(found.values(), key=lambda adapter: adapter.task))


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
        data = read_json(folder / RECORD)
    except ValueError:
        return None
    known = {field.name for field in fields(AddedRecord)}
    return AddedRecord(**data) if isinstance(data, dict) and data.keys() == known else None


def write_record(folder: Path, record: AddedRecord) -> None:
    """Put the record beside the weights."""
    write_json(folder / RECORD, asdict(record))


def adapter_shape(adapter: StoredAdapter) -> AdapterShape:
    """What an adapter's files say; nothing is loaded but the headers.

    Raises:
        OSError, ValueError, SafetensorError: a file is gone or damaged.
    """
    return _shape(adapter.folder, adapter.stamp)


@lru_cache(maxsize=1024)
def _shape(folder: Path, stamp: str) -> AdapterShape:
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    down = {key.rpartition(".lora_A.")[0]: shape for key, shape in shapes.items() if ".lora_A." in key}
    return AdapterShape(
        rank=max((shape[0] for shape in down.values()), default=0),
        alpha=float(config["lora_alpha"]),
        modules=tuple(sorted({module.rpartition(".")[2] for module in down})),
        base=str(config.get("base_model_name_or_path") or ""),
    )
