"""The harness: every method under test on the same evaluation rows, answers by option likelihood or by exact match."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from lorafleet.composition import Composition
from lorafleet.engine import GenerationRequest, ScoreRequest
from lorafleet.errors import SettingsError, closest
from lorafleet.evaluation.metrics import best_option, exact_match
from lorafleet.evaluation.under_test import UNDER_TEST, MethodUnderTest
from lorafleet.fleet import Fleet
from lorafleet.tasks import Corpus, Example, Task, load_catalogue, load_corpus
from lorafleet.weighing import TaskWeights

Setting = Literal["iid", "ood"]
Note = Callable[[int, str], None]
FREE_TEXT_TOKENS = 24


@dataclass(frozen=True)
class TaskScore:
    """The share of right answers of one method on one task, in per cent, and how many rows it was measured on."""

    score: float
    rows: int


@dataclass(frozen=True)
class Evaluation:
    """The table: method, task, score."""

    setting: Setting
    scores: Mapping[str, Mapping[str, TaskScore]]

    def mean(self, method: str) -> float:
        """The mean over the tasks, every task counting the same."""
        return fmean(score.score for score in self.scores[method].values())

    def as_json(self) -> dict[str, Any]:
        """As `lorafleet evaluate --json` prints it."""
        return {
            "setting": self.setting,
            "methods": {
                method: {
                    "mean": round(self.mean(method), 2),
                    "tasks": {task: {"score": round(s.score, 2), "rows": s.rows} for task, s in tasks.items()},
                }
                for method, tasks in self.scores.items()
            },
        }


def methods_under_test(names: Sequence[str] | None, setting: Setting) -> dict[str, MethodUnderTest]:
    """The methods of these names; all that the setting allows where none is named.

    Raises:
        SettingsError: a name is unknown, or the method has no meaning in the setting.
    """
    if names is None:
        return {name: method for name, method in UNDER_TEST.items() if setting == "iid" or not method.knows_task}
    for name in names:
        if name not in UNDER_TEST:
            raise SettingsError(f"no method under test named {name!r}", closest(name, UNDER_TEST))
        if setting == "ood" and UNDER_TEST[name].knows_task:
            raise SettingsError(
                f"method {name} has no meaning with the own adapter masked", "Leave it out, or use --setting iid"
            )
    return {name: UNDER_TEST[name] for name in names}


def evaluate(
    fleet: Fleet,
    methods: Sequence[str] | None = None,
    setting: Setting = "iid",
    limit: int | None = None,
    note: Note | None = None,
) -> Evaluation:
    """Measure methods on the evaluation rows of the tasks of the settings.

    Args:
        setting: "ood" leaves the rows of the task itself out of retrieval, and so its adapter.
        limit: at most so many rows a task; all where absent.
        note: is called with rows done and the task, for a progress bar; every method counts its rows.

    Raises:
        LoRAFleetError: rows, index or adapters are missing for a method that needs them.
    """
    under_test = methods_under_test(methods, setting)
    corpora = evaluation_corpora(fleet, limit)
    scores: dict[str, dict[str, TaskScore]] = {name: {} for name in under_test}
    for corpus in corpora:
        task, examples = corpus.task, corpus.examples
        weights = _weights(fleet, task, examples, setting, any(method.retrieves for method in under_test.values()))
        for name, method in under_test.items():
            if method.knows_task and not task.trained:
                continue
            compositions = [fleet.composition(method.weights(task.name, row), method.method) for row in weights]
            right = _right_answers(fleet, task, examples, compositions)
            scores[name][task.name] = TaskScore(100 * fmean(right), len(right))
            if note is not None:
                note(len(right), f"{task.name}, {name}")
    return Evaluation(setting, {name: tasks for name, tasks in scores.items() if tasks})


def evaluation_corpora(fleet: Fleet, limit: int | None) -> list[Corpus]:
    """The evaluation rows of every task of the settings."""
    settings = fleet.settings.tasks
    if limit is not None:
        settings = settings.model_copy(update={"rows_per_task": limit})
    return [load_corpus(task, "evaluation", settings) for task in load_catalogue(settings).values()]


def _weights(
    fleet: Fleet, task: Task, examples: Sequence[Example], setting: Setting, retrieves: bool
) -> Sequence[TaskWeights]:
    if not retrieves:
        return [TaskWeights({})] * len(examples)
    masked = task.name if setting == "ood" else None
    return [fleet.weigh(found) for found in fleet.neighbours([example.key for example in examples], without=masked)]


def _right_answers(fleet: Fleet, task: Task, examples: Sequence[Example], compositions: Sequence[Composition]) -> list[bool]:
    if task.answers is None:
        asked = [
            ScoreRequest(example.prompt, example.options, composition)
            for example, composition in zip(examples, compositions, strict=True)
        ]
        found = [best_option(row, task.scoring) for row in fleet.engine.score(asked)]
        return [answer in example.answers for answer, example in zip(found, examples, strict=True)]
    prompts = [
        GenerationRequest(example.prompt, composition, max_tokens=FREE_TEXT_TOKENS, stop=("\n",))
        for example, composition in zip(examples, compositions, strict=True)
    ]
    return [
        exact_match(generation.text, example.answers)
        for generation, example in zip(fleet.engine.generate(prompts), examples, strict=True)
    ]
