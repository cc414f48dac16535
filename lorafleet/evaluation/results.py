"""The tables, from kept predictions alone: no model, no corpus, no GPU."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lorafleet.errors import SettingsError
from lorafleet.evaluation.intervals import Bootstrap, Estimate, Scores
from lorafleet.evaluation.metrics import best_option, exact_match, f1
from lorafleet.evaluation.records import Part, about, is_current, read_rows
from lorafleet.evaluation.scoring import Choice, option_scores, read_choices
from lorafleet.evaluation.under_test import SETTINGS, UNDER_TEST, Setting
from lorafleet.storage import read_json

REFERENCE = "perfect"
FAMILY_ORDER = ("commonsense", "question_answering", "inference", "paraphrase", "sentiment", "lexical")
Measure = Literal["score", "f1"]


@dataclass(frozen=True)
class Row:
    """An evaluation row as it was asked; `text` is without instruction."""

    text: str
    options: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class TaskRows:
    """The evaluation rows of a task, by their identifiers, and how its options are compared."""

    name: str
    family: str
    scoring: str
    rows: Mapping[str, Row]


@dataclass(frozen=True)
class Judged:
    """What a method's answers to a task's rows are worth.

    Attributes:
        ids: of the rows, in the order of everything else here.
        answers: what was answered.
        score: float64 [rows], 0 or 1: the right option, or an exact match.
        f1: float64 [rows] for a free-text question, else None.
        weights: of each row's composition.
    """

    ids: tuple[str, ...]
    answers: tuple[str, ...]
    score: Scores
    f1: Scores | None
    weights: tuple[Mapping[str, float], ...]

    def measure(self, measure: Measure) -> Scores:
        """One of the two."""
        return self.score if measure == "score" or self.f1 is None else self.f1


@dataclass
class Results:
    """Everything that a folder of kept predictions says.

    Attributes:
        judged: by setting, method and task.
        tasks: by name, in the order of their families.
    """

    folder: Path
    tasks: dict[str, TaskRows]
    judged: dict[Setting, dict[str, dict[str, Judged]]]
    choices: dict[str, Choice]
    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    @property
    def settings(self) -> list[Setting]:
        """The settings that something was measured in."""
        return [setting for setting in SETTINGS if self.judged.get(setting)]

    def methods(self, setting: Setting) -> list[str]:
        """The methods that were measured in a setting, in the order of the registry, variants behind their method."""
        known = list(UNDER_TEST)

        def place(name: str) -> tuple[int, str]:
            plain = name.partition("@")[0]
            return known.index(plain) if plain in known else len(known), name

        return sorted(self.judged.get(setting, {}), key=place)

    def tasks_of(self, setting: Setting) -> list[str]:
        """The tasks that were measured in a setting, in the order of the families."""
        there = {task for tasks in self.judged.get(setting, {}).values() for task in tasks}
        return [task for task in self.tasks if task in there]

    @property
    def families(self) -> dict[str, list[str]]:
        """The tasks of each family."""
        found: dict[str, list[str]] = {}
        for task in self.tasks.values():
            found.setdefault(task.family, []).append(task.name)
        return found

    def scores(
        self, setting: Setting, method: str, tasks: Sequence[str] | None = None, measure: Measure = "score"
    ) -> dict[str, Scores]:
        """A method's scores by task, in per cent; of the tasks that it was measured on."""
        measured = self.judged.get(setting, {}).get(method, {})
        wanted = [task for task in self.tasks if task in measured and (tasks is None or task in tasks)]
        return {task: 100 * measured[task].measure(measure) for task in wanted}

    def mean(self, setting: Setting, method: str, tasks: Sequence[str] | None = None) -> Estimate | None:
        """The mean over tasks with its interval; None where none of them was measured."""
        scores = self.scores(setting, method, tasks)
        return self.bootstrap.mean(scores) if scores else None

    def task(self, setting: Setting, method: str, task: str, measure: Measure = "score") -> Estimate | None:
        """The score on one task with its interval; None where it was not measured."""
        scores = self.scores(setting, method, [task], measure)
        return self.bootstrap.mean(scores) if scores else None

    def against(
        self, setting: Setting, method: str, reference: str = REFERENCE, tasks: Sequence[str] | None = None
    ) -> tuple[Estimate, Estimate | None] | None:
        """The difference to a reference in points, and the share of it in per cent, over the rows that both answered.

        Perfect selection is a reference with the own adapter masked too: it is what there was to reach.
        """
        mine = self.judged.get(setting, {}).get(method, {})
        other_setting: Setting = "iid" if reference == REFERENCE and setting == "ood" else setting
        others = self.judged.get(other_setting, {}).get(reference, {})
        common = [task for task in self.tasks if task in mine and task in others and (tasks is None or task in tasks)]
        scores, references = {}, {}
        for task in common:
            places = {name: place for place, name in enumerate(others[task].ids)}
            shared = [(place, places[name]) for place, name in enumerate(mine[task].ids) if name in places]
            if shared:
                here, there = np.array(shared).T
                scores[task], references[task] = 100 * mine[task].score[here], 100 * others[task].score[there]
        if not scores:
            return None
        return self.bootstrap.difference(scores, references), self.bootstrap.ratio(scores, references)

    @cached_property
    def retrieval(self) -> dict[str, dict[str, list[list[tuple[str, float]]]]]:
        """By form of query and task, of each row: the tasks whose rows were found with their shares, the heaviest first."""
        found: dict[str, dict[str, list[list[tuple[str, float]]]]] = {}
        for path in sorted((self.folder / "retrieval").glob("*/*.parquet")):
            rows = [list(zip(row["ranked"], row["shares"], strict=True)) for row in read_rows(path)]
            if path.stem in self.tasks:
                found.setdefault(path.parent.name, {})[path.stem] = rows
        return found

    @cached_property
    def all_families(self) -> dict[str, str]:
        """The family of every task that retrieval may find, those that were not measured among them."""
        files = sorted((self.folder / "retrieval").glob("*/*.parquet"))
        known = {task.name: task.family for task in self.tasks.values()}
        found: dict[str, str] = (about(files[0]).get("families", {}) if files else {}) | known
        return found

    @property
    def case_study(self) -> dict[str, Any] | None:
        """What was kept of the case study."""
        found: dict[str, Any] | None = read_json(self.folder / "case_study.json")
        return found

    @cached_property
    def _said(self) -> list[dict[str, Any]]:
        parts = ((setting, method, task) for setting, by in self.judged.items() for method in by for task in by[method])
        return [about(self.folder / "predictions" / setting / method / f"{task}.parquet") for setting, method, task in parts]

    @property
    def made_by(self) -> dict[str, Any]:
        """What the newest of the predictions says of how it was made."""
        return max(self._said, key=lambda said: str(said.get("date", "")), default={})

    @property
    def fleets(self) -> int:
        """How many different fleets made these predictions: more than one, and they are not to be compared."""
        return len({said.get("fleet") for said in self._said})


def read_results(
    folder: Path,
    methods: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    settings: Sequence[Setting] = SETTINGS,
    bootstrap: Bootstrap | None = None,
    parts: Mapping[Part, str] | None = None,
) -> Results:
    """Judge what is kept in a folder.

    Args:
        methods, tasks, settings: only these; everything that is there where absent.
        parts: those of a plan, with their fingerprints: only what would be computed so today.

    Raises:
        SettingsError: there are no predictions, or a file is damaged.
    """
    choices = read_choices(folder)
    known = _task_rows(folder, tasks, choices)
    marks = None if parts is None else {(part.setting, part.method, part.task): mark for part, mark in parts.items()}
    moved = _moved(folder)
    judged: dict[Setting, dict[str, dict[str, Judged]]] = {}
    for setting in settings:
        for path in sorted((folder / "predictions" / setting).glob("*/*.parquet")):
            method = path.parent.name
            if path.stem not in known or (methods is not None and method not in methods):
                continue
            planned = marks is None or is_current(path, marks.get((setting, method, path.stem), ""))
            if not planned or (path.stem, setting == "held_out") in moved:
                continue
            predictions = read_rows(path)
            # Predictions from before the rows changed are of no use.
            if all(prediction["id"] in known[path.stem].rows for prediction in predictions):
                judged.setdefault(setting, {}).setdefault(method, {})[path.stem] = judge(known[path.stem], predictions)
    if not judged:
        raise SettingsError(f"no predictions in {folder}", "Run: lorafleet evaluate")
    return Results(folder, known, judged, choices, bootstrap or Bootstrap())


def _moved(folder: Path) -> set[tuple[str, bool]]:
    """Tasks whose predictions with an adapter, or without one (True), are from before that changed."""
    files: dict[str, dict[bool, list[Path]]] = {}
    for path in (folder / "predictions").glob("*/*/*.parquet"):
        files.setdefault(path.stem, {}).setdefault(path.parent.parent.name == "held_out", []).append(path)
    moved = set()
    for task, kept in files.items():
        if len(kept) > 1:
            newest = {without: max(str(about(path).get("date", "")) for path in paths) for without, paths in kept.items()}
            moved.add((task, newest[False] > newest[True]))
    return moved


def judge(task: TaskRows, predictions: Sequence[Mapping[str, Any]]) -> Judged:
    """What predictions are worth, by the rows that they answer."""
    answers, scores, word_scores = [], [], []
    for prediction in predictions:
        row = task.rows[prediction["id"]]
        if prediction["text"] is None:
            answer = row.options[best_option(option_scores(row.options, prediction["options"]), task.scoring)]
            scores.append(float(answer in row.answers))
        else:
            answer = prediction["text"]
            scores.append(float(exact_match(answer, row.answers)))
            word_scores.append(f1(answer, row.answers))
        answers.append(answer)
    return Judged(
        tuple(prediction["id"] for prediction in predictions),
        tuple(answers),
        np.array(scores),
        np.array(word_scores) if word_scores else None,
        tuple(dict(prediction["weights"]) for prediction in predictions),
    )


def _task_rows(folder: Path, tasks: Sequence[str] | None, choices: Mapping[str, Choice]) -> dict[str, TaskRows]:
    found: dict[str, TaskRows] = {}
    for path in sorted((folder / "rows").glob("*.parquet")):
        if tasks is not None and path.stem not in tasks:
            continue
        said = about(path)
        rows = {row["id"]: Row(row["text"], tuple(row["options"]), tuple(row["answers"])) for row in read_rows(path)}
        scoring = choices[path.stem].chosen if path.stem in choices else said["scoring"]
        found[path.stem] = TaskRows(path.stem, said["family"], scoring, rows)
    families = list(dict.fromkeys((*FAMILY_ORDER, *sorted(task.family for task in found.values()))))
    return dict(sorted(found.items(), key=lambda item: (families.index(item[1].family), item[0])))
