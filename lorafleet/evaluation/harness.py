"""The harness: computes the parts that are missing, one after the other, and keeps each when it is whole."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from lorafleet.errors import LoRAFleetError
from lorafleet.evaluation.bench import Bench
from lorafleet.evaluation.plan import Plan, fleet_mark, plan, retrieval_mark
from lorafleet.evaluation.queries import FORMS, QueryForm, row_text
from lorafleet.evaluation.ranking import ranked
from lorafleet.evaluation.records import (
    Part,
    digest,
    is_current,
    row_ids,
    split_folder,
    write_predictions,
    write_retrieval,
    write_rows,
)
from lorafleet.evaluation.scoring import Choice, choose_from_files, write_choices
from lorafleet.evaluation.under_test import Variant, variant
from lorafleet.models import pick_device
from lorafleet.tasks import Split
from lorafleet.weighing import LEARNED

Note = Callable[[int, str], None]


@dataclass
class Outcome:
    """What a run did.

    Attributes:
        kept: parts that were there already.
        computed: parts that were computed now.
        failed: why there is no part, by part.
        parts: all that were asked for, with their fingerprints.
    """

    kept: int = 0
    computed: int = 0
    failed: dict[Part, str] = field(default_factory=dict)
    parts: Mapping[Part, str] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether there is anything to show."""
        return self.kept + self.computed > 0


def run(bench: Bench, work: Plan, note: Note | None = None) -> Outcome:
    """Compute what is missing of a plan. A part that fails is told of, and does not stop the others.

    Args:
        note: is called with rows done and the part, for a progress bar.
    """
    outcome = Outcome(kept=work.kept, parts=work.parts)
    task = None
    for part in work.missing:
        if part.task != task:
            bench.forget()
            task = part.task
        rows, why = attempt(bench, part, work.parts[part])
        if why:
            outcome.failed[part] = why
        else:
            outcome.computed += 1
        if note is not None:
            note(rows, str(part))
    return outcome


def attempt(bench: Bench, part: Part, fingerprint: str) -> tuple[int, str]:
    """Answer a part and keep it: how many rows, or why not. One for which a GPU has no memory is tried once more."""
    # Not above: tables are made from files without it.
    import torch

    try:
        try:
            return compute(bench, part, fingerprint), ""
        except torch.OutOfMemoryError:
            # Others may share the GPU; what earlier parts took is given back.
            torch.cuda.empty_cache()
        return compute(bench, part, fingerprint), ""
    except Exception as error:
        return 0, reason(error)


def compute(bench: Bench, part: Part, fingerprint: str) -> int:
    """Answer a part's rows, and keep the answers; returns how many.

    Raises:
        LoRAFleetError: rows, index or adapters are missing for the method.
    """
    began = time.monotonic()
    one = variant(part.method)
    settings = one.apply(bench.settings)
    rows = bench.rows(part.task, part.split, masked=part.setting == "ood")
    compositions = one.method.compose(bench, rows, settings)
    answers = one.method.answer(bench, rows, compositions)
    found: Sequence[Sequence[str]] = [()] * len(rows.examples)
    if one.method.retrieves:
        found = [list(shares) for shares in ranked(bench, rows, settings, settings.evaluation.query)]
    about = {**_about(bench, fingerprint), "part": vars(part), "seconds": round(time.monotonic() - began, 3)}
    write_predictions(part.path(bench.folder), part, rows.examples, answers, found, about)
    return len(answers)


def preparations(bench: Bench, methods: Sequence[Variant], split: Split = "evaluation") -> int:
    """How many steps `prepare` takes: training rows by task, the router, evaluation rows as queries by task and form."""
    if not any(one.method.retrieves for one in methods):
        return 0
    queries = len(FORMS) * len(bench.tasks) if split == "evaluation" else 0
    return len(bench.indexed) + _learned(bench, methods, split) + queries


def prepare(bench: Bench, methods: Sequence[Variant], note: Note | None = None, split: Split = "evaluation") -> None:
    """Keep what the tables need beside the predictions: the rows, and what retrieval finds for evaluation rows.

    Args:
        note: is called with each step done, and what it was.
    """
    keep_rows(bench, bench.tasks, split)
    if preparations(bench, methods, split) and bench.indexed:
        for name in bench.indexed:
            if bench.settings.evaluation.search == "exact":
                bench.keys(name)
            if note is not None:
                note(1, f"{name}, training rows")
        if _learned(bench, methods, split):
            # Who answers, several processes perhaps, finds it kept.
            _ = bench.places
            if note is not None:
                note(1, "the router")
        if split == "evaluation":
            keep_retrieval(bench, list(bench.tasks), note)


def _learned(bench: Bench, methods: Sequence[Variant], split: Split) -> bool:
    """Whether a method goes by the router, or what retrieval finds for evaluation rows."""
    going_by = [one.apply(bench.settings) for one in methods if one.method.retrieves]
    weighers = {settings.weighing.weigher for settings in (*going_by, *([bench.settings] if split == "evaluation" else []))}
    return not weighers.isdisjoint(LEARNED)


def keep_rows(bench: Bench, tasks: Iterable[str], split: Split = "evaluation") -> None:
    """Keep the measured rows of tasks beside the predictions, where they are not kept yet."""
    for name in tasks:
        if split != "evaluation" and not bench.tasks[name].trained:
            continue
        rows = bench.rows(name, split)
        path = split_folder(bench.folder, split) / "rows" / f"{name}.parquet"
        mark = digest(bench.corpus(name, split).fingerprint, len(rows.examples), rows.task.family, rows.task.scoring)
        if not is_current(path, mark):
            texts = [row_text(rows.task, example) for example in rows.examples]
            described = {"fingerprint": mark, "task": name, "family": rows.task.family, "scoring": rows.task.scoring}
            write_rows(path, name, texts, rows.examples, described)


def keep_retrieval(bench: Bench, tasks: Sequence[str], note: Note | None = None) -> None:
    """Keep which tasks' rows are found for the evaluation rows, as queries of every form, nothing masked."""
    weighing = bench.settings.weighing
    for name in tasks:
        for form in FORMS:
            mark = digest(
                form,
                weighing.weigher if weighing.weigher in LEARNED else "neighbours",
                weighing.neighbours,
                weighing.sharpness,
                bench.corpus(name, "evaluation").fingerprint,
                retrieval_mark(bench),
            )
            path = bench.folder / "retrieval" / form / f"{name}.parquet"
            if not is_current(path, mark):
                families = {task.name: task.family for task in bench.everything.values()}
                write_retrieval(path, _ranked(bench, name, form), {**_about(bench, mark), "families": families})
            if note is not None:
                note(1, f"{name} as queries, {form}")
        # A hundred neighbours a row, of every task in three forms, would be a million.
        bench.forget()


def _ranked(bench: Bench, task: str, form: QueryForm) -> list[dict[str, Any]]:
    rows = bench.rows(task)
    return [
        {"id": name, "task": task, "ranked": list(shares), "shares": list(shares.values())}
        for name, shares in zip(row_ids(rows.examples), ranked(bench, rows, bench.settings, form), strict=True)
    ]


def choose_scorings(bench: Bench, note: Note | None = None) -> dict[str, Choice]:
    """Choose how the options of every task are compared, by base model and own adapter on training rows; and keep it.

    Raises:
        LoRAFleetError: a task's training rows could not be answered.
    """
    outcome = run(bench, scoring_plan(bench), note)
    if outcome.failed:
        part, why = next(iter(outcome.failed.items()))
        raise LoRAFleetError(f"no scoring can be chosen: {part}: {why}", "Mend the cause, and run again")
    return kept_choices(bench)


def scoring_plan(bench: Bench) -> Plan:
    """The parts on training rows that choose the scorings."""
    return plan(bench, [variant("base"), variant("perfect")], ("iid", "held_out"), split="train")


def kept_choices(bench: Bench) -> dict[str, Choice]:
    """The scorings that the kept parts on training rows ask for; they are written beside the results."""
    files: dict[str, list[Part]] = {}
    for part in scoring_plan(bench).parts:
        files.setdefault(part.task, []).append(part)
    choices: dict[str, Choice] = {}
    for task, parts in files.items():
        choice = choose_from_files(bench, task, [part.path(bench.folder) for part in parts])
        if choice is not None:
            choices[task] = choice
    write_choices(bench.folder, choices)
    return choices


def reason(error: Exception) -> str:
    """An error in one line."""
    return str(error) if isinstance(error, LoRAFleetError) else f"{type(error).__name__}: {' '.join(str(error).split())}"


def _about(bench: Bench, fingerprint: str) -> dict[str, Any]:
    return {
        "fingerprint": fingerprint,
        "fleet": fleet_mark(bench),
        "base": bench.settings.models.base,
        "encoder": bench.settings.models.encoder,
        "device": str(pick_device(bench.settings.models.device)),
        "torch": version("torch"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
