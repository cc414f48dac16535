"""How the options of each task are compared: chosen on training rows, kept in a file beside the results."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from lorafleet.engine import OptionScore
from lorafleet.evaluation.bench import Bench
from lorafleet.evaluation.metrics import best_option
from lorafleet.evaluation.records import read_rows
from lorafleet.storage import read_json, write_json
from lorafleet.tasks.task import Scoring

SCORINGS: tuple[Scoring, ...] = get_args(Scoring)
FILE = "scoring.json"


@dataclass(frozen=True)
class Choice:
    """How the options of a task are compared, and why.

    Attributes:
        accuracy: of each scoring, in per cent of the predictions on training rows.
        rows: how many predictions those are.
    """

    chosen: Scoring
    accuracy: Mapping[Scoring, float]
    rows: int


def choose_scoring(
    predictions: Sequence[tuple[Sequence[OptionScore], int]], declared: Scoring = "sum", least_gain: float = 1.0
) -> Choice:
    """The scoring that is right most often.

    Args:
        predictions: on training rows, each with the place of its right option.
        declared: the catalogue's, which stays where no other is better by `least_gain` points.
    """
    right: Counter[Scoring] = Counter()
    for options, wanted in predictions:
        right.update(scoring for scoring in SCORINGS if best_option(options, scoring) == wanted)
    accuracy = {scoring: 100 * right[scoring] / max(len(predictions), 1) for scoring in SCORINGS}
    best = max(SCORINGS, key=lambda scoring: (accuracy[scoring], scoring == declared))
    chosen = best if accuracy[best] - accuracy[declared] >= least_gain else declared
    return Choice(chosen, {scoring: round(value, 2) for scoring, value in accuracy.items()}, len(predictions))


def write_choices(folder: Path, choices: Mapping[str, Choice]) -> None:
    """Keep choices by task, beside those that are there."""
    write_json(folder / FILE, {**(read_json(folder / FILE) or {}), **{task: asdict(one) for task, one in choices.items()}})


def read_choices(folder: Path) -> dict[str, Choice]:
    """The kept choices by task; a split's folder has those of the folder that it lies in. None where none were made."""
    kept = read_json(folder / FILE) or read_json(folder.parent / FILE) or {}
    return {task: Choice(**choice) for task, choice in kept.items()}


def option_scores(options: Sequence[str], kept: Sequence[Mapping[str, float]]) -> list[OptionScore]:
    """Scores as the engine gave them, from a file's."""
    return [
        OptionScore(option, score["total"], int(score["tokens"]), int(score["bytes"]))
        for option, score in zip(options, kept, strict=True)
    ]


def choose_from_files(bench: Bench, task: str, files: Sequence[Path]) -> Choice | None:
    """The scoring of a task by the predictions of these files; None for a task of free-text questions."""
    declared = bench.tasks[task]
    if declared.answers is not None:
        return None
    examples = bench.corpus(task, "train").examples
    predictions = [
        (option_scores(example.options, row["options"]), example.options.index(example.answer))
        for file in files
        for example, row in zip(examples, read_rows(file), strict=False)
    ]
    return choose_scoring(predictions, declared.scoring)
