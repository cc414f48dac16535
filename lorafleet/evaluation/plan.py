"""What there is to measure: the parts of a run, and which of them are kept already."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from lorafleet.adapters import StoredAdapter
from lorafleet.composition.files import CONFIG_FILE, WEIGHTS_FILE
from lorafleet.errors import SettingsError
from lorafleet.evaluation.bench import Bench
from lorafleet.evaluation.lorahub import SEARCH_PACKAGE
from lorafleet.evaluation.records import Part, digest, is_current
from lorafleet.evaluation.under_test import UNDER_TEST, Setting, Variant, variant
from lorafleet.models import fingerprint
from lorafleet.tasks import Split

Asked = Literal["iid", "ood", "held_out", "all"]
ASKED: Mapping[Asked, tuple[Setting, ...]] = {
    "iid": ("iid", "held_out"),
    "ood": ("ood",),
    "held_out": ("held_out",),
    "all": ("iid", "ood", "held_out"),
}
"""What a user asks for: tasks without an adapter stand in one table with those that have theirs."""


@dataclass(frozen=True)
class Plan:
    """The parts of a run.

    Attributes:
        parts: all of them with their fingerprints, those of one task together.
        missing: those that are not kept, or whose rows, adapters or settings have changed since.
        kept: how many there is nothing to do for.
    """

    parts: Mapping[Part, str]
    missing: tuple[Part, ...]
    kept: int

    def rows(self, bench: Bench) -> int:
        """How many rows are to be answered."""
        return sum(len(bench.rows(part.task, part.split).examples) for part in self.missing)

    def share(self, number: int, of: int) -> "Plan":
        """The part of the work of one of several processes that share it."""
        return Plan(self.parts, self.missing[number - 1 :: of], self.kept)


def variants(names: Sequence[str] | None, settings: Sequence[Setting], multitask: bool = False) -> list[Variant]:
    """The methods of these names; all that can be had and have a meaning in one of the settings where none is named.

    Args:
        multitask: whether there is an adapter that was trained on everything.

    Raises:
        SettingsError: a name is unknown, or a method has no meaning in any of the settings.
    """
    if names is None:
        missing = {"multitask_lora": not multitask, "lorahub": find_spec(SEARCH_PACKAGE) is None}
        names = [name for name in UNDER_TEST if not missing.get(name, False)]
        return [one for one in map(variant, names) if set(one.method.settings) & set(settings)]
    found = [variant(name) for name in dict.fromkeys(names)]
    for one in found:
        if not set(one.method.settings) & set(settings):
            raise SettingsError(
                f"method {one.name} has no meaning with the own adapter masked", "Leave it out, or use --setting iid"
            )
    return found


def plan(
    bench: Bench,
    methods: Sequence[Variant],
    settings: Sequence[Setting],
    split: Split = "evaluation",
    force: bool = False,
) -> Plan:
    """The parts of methods in settings over the tasks of the bench; a task is held out where the pool has no adapter of it.

    Args:
        force: take nothing as kept.

    Raises:
        LoRAFleetError: rows cannot be read, a setting is not allowed, or there are no adapters to compose.
    """
    parts: dict[Part, str] = {}
    for task in bench.tasks.values():
        if split != "evaluation" and not (task.trained and bench.rows(task.name, split).examples):
            continue
        own = task.name in bench.roster.adapters
        for setting in settings:
            if own == (setting == "held_out"):
                continue
            for one in methods:
                if setting in one.method.settings and (task.trained or one.method.own_rows != "needed"):
                    part = Part(task.name, setting, one.name, split)
                    parts[part] = _fingerprint(bench, part, one)
    missing = [part for part, mark in parts.items() if force or not is_current(part.path(bench.folder), mark)]
    return Plan(parts, tuple(missing), len(parts) - len(missing))


def fleet_mark(bench: Bench) -> str:
    """Which fleet this is: base model and adapters."""
    models = bench.settings.models
    adapters = [(task, _weights_digest(adapter)) for task, adapter in bench.roster.adapters.items()]
    return digest(fingerprint(models.base, models.base_revision), adapters)


def retrieval_mark(bench: Bench) -> list[object]:
    """What decides over which rows are found."""
    models, rows = bench.settings.models, bench.settings.evaluation.search
    corpora = [(task, bench.corpus(task, "train").fingerprint) for task in bench.indexed]
    embedded = bench.settings.index.embedded
    searched = [asdict(bench.searched)] if bench.searched else []
    return [rows, fingerprint(models.encoder, models.encoder_revision), embedded, corpora, *searched]


def _fingerprint(bench: Bench, part: Part, one: Variant) -> str:
    """Everything that the part's answers depend on."""
    settings, models, method = one.apply(bench.settings), bench.settings.models, one.method
    task = bench.everything[part.task]
    taken: list[str] = []
    if method.adapters == "own":
        taken = [part.task]
    elif method.adapters == "pool":
        taken = [*bench.pool(part.task if part.setting == "ood" else None), *([bench.multitask] if bench.multitask else [])]
    retrieval = (
        [settings.weighing.model_dump(), settings.evaluation.query, retrieval_mark(bench)] if method.retrieves else []
    )
    uses_own = method.own_rows != "unused" and task.trained
    shown = [bench.corpus(part.task, "train").fingerprint, settings.evaluation.seed] if uses_own else []
    return digest(
        part.setting,
        part.method,
        len(bench.rows(part.task, part.split).examples),
        bench.corpus(part.task, part.split).fingerprint,
        fingerprint(models.base, models.base_revision),
        models.dtype,
        settings.generation.max_prompt_tokens,
        settings.evaluation.answer_tokens,
        settings.composing.model_dump() if taken else {},
        [(task, _weights_digest(bench.roster.adapters[task])) for task in taken],
        retrieval,
        *shown,
    )


def _weights_digest(adapter: StoredAdapter) -> str:
    return _digest_of(adapter.folder, adapter.stamp)


@lru_cache(maxsize=1024)
def _digest_of(folder: Path, stamp: str) -> str:
    """Of the files themselves, not of their dates: a fleet that was copied to another machine is still the same."""
    found = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with (folder / name).open("rb") as file:
            while piece := file.read(1 << 20):
                found.update(piece)
    return found.hexdigest()[:16]
