"""The adapters in storage, and the names by which requests may call them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorafleet.composition.adapter import CONFIG_FILE
from lorafleet.config import Settings
from lorafleet.errors import UnknownAdapter, closest
from lorafleet.models import fingerprint
from lorafleet.training.cards import AdapterCard, adapter_name, read_card


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter's folder.

    Attributes:
        name: the folder's name, `<base>-<task>-<rank>` where LoRAFleet trained it.
        task: what the adapter is called in weights: its card's task, or its name where there is no card.
        card: None for an adapter that other tools have made.
    """

    name: str
    task: str
    folder: Path
    card: AdapterCard | None


class Roster:
    """The adapters of a fleet, one a task."""

    def __init__(self, adapters: Iterable[StoredAdapter]) -> None:
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


def stored_adapters(settings: Settings) -> Roster:
    """The adapters in `settings.adapters` that belong to the base model of the settings.

    Where a task has several (of different ranks), the one that the training settings name is taken, else the newest.
    """
    base = fingerprint(settings.models.base, settings.models.base_revision)
    found: dict[str, StoredAdapter] = {}
    folders = sorted(settings.adapters.glob(f"*/{CONFIG_FILE}"), key=lambda path: path.stat().st_mtime)
    for folder in (path.parent for path in folders):
        card = read_card(folder)
        if folder.name.startswith(".") or (card is not None and card.base_fingerprint != base):
            continue
        task = card.task if card else folder.name
        preferred = found.get(task)
        if preferred is None or preferred.name != adapter_name(settings, task):
            found[task] = StoredAdapter(folder.name, task, folder, card)
    return Roster(sorted(found.values(), key=lambda adapter: adapter.task))
