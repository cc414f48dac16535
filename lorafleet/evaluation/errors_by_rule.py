"""Which rows are of which kind, by plain rules, and how often each method errs on them.

The kinds are the six of arXiv 2602.21222, section 9, which were told by hand there. A rule sees the row alone, never the
answer of a model: otherwise a kind could not have rows that were answered well. A row may be of several kinds.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lorafleet.evaluation.intervals import Estimate
from lorafleet.evaluation.results import Results, Row, TaskRows
from lorafleet.evaluation.under_test import Setting

LONG_WORDS = 120
ALIKE = 0.5
OVERLAP = 0.8
NEGATIONS = re.compile(
    r"\b(not|no|never|none|nobody|nothing|nowhere|neither|nor|cannot|without|hardly|\w+n[’']t)\b", re.IGNORECASE
)
WORD = re.compile(r"\w+")
NARRATIVE = frozenset({"story_cloze", "hellaswag", "copa", "cosmos_qa"})
EVERYDAY = frozenset({"commonsense_qa", "piqa", "openbookqa"})


@dataclass(frozen=True)
class Kind:
    """A kind of row that is easily answered wrongly.

    Attributes:
        rule: in words, as the report prints it.
        holds: whether a row is of the kind.
    """

    name: str
    rule: str
    holds: Callable[[TaskRows, Row], bool]


def _negation(task: TaskRows, row: Row) -> bool:
    return NEGATIONS.search(row.text) is not None


def _long(task: TaskRows, row: Row) -> bool:
    return len(WORD.findall(row.text)) >= LONG_WORDS


def _narrative(task: TaskRows, row: Row) -> bool:
    return task.name in NARRATIVE


def _everyday(task: TaskRows, row: Row) -> bool:
    return task.name in EVERYDAY


def _ambiguous(task: TaskRows, row: Row) -> bool:
    right = _words(" ".join(row.answers[:1]))
    wrong = [_words(option) for option in row.options if option not in row.answers]
    return any(len(right & words) >= ALIKE * len(right | words) for words in wrong)


def _entailment(task: TaskRows, row: Row) -> bool:
    if task.family != "inference":
        return False
    premise, _, hypothesis = row.text.rpartition("\n")
    claimed = _words(hypothesis.partition(":")[2] or hypothesis)
    return bool(claimed) and len(claimed & _words(premise)) >= OVERLAP * len(claimed)


KINDS = (
    Kind("Narrative coherence", f"the task asks what comes next or why: {', '.join(sorted(NARRATIVE))}", _narrative),
    Kind("Commonsense", f"the task asks for knowledge of the everyday world: {', '.join(sorted(EVERYDAY))}", _everyday),
    Kind(
        "Ambiguity",
        f"a wrong option shares at least {100 * ALIKE:.0f} % of its words with the right one (of all words of the two)",
        _ambiguous,
    ),
    Kind(
        "Negation",
        "not, no, never, without, ... or a word in n't stands in the row's text (instructions do not count)",
        _negation,
    ),
    Kind("Long context", f"the row's text has {LONG_WORDS} words or more", _long),
    Kind(
        "Entailment ambiguity",
        f"an inference task, and at least {100 * OVERLAP:.0f} % of the hypothesis's words stand in the premise",
        _entailment,
    ),
)


def rows_of_kind(results: Results, kind: Kind) -> dict[str, set[str]]:
    """The identifiers of the rows of a kind, by task."""
    found = {
        task.name: {name for name, row in task.rows.items() if kind.holds(task, row)} for task in results.tasks.values()
    }
    return {task: rows for task, rows in found.items() if rows}


def error_rates(
    results: Results, setting: Setting, method: str, rows: Mapping[str, set[str]]
) -> tuple[Estimate, int] | None:
    """How many of these rows a method answers wrongly, in per cent, all rows counting the same; and how many they are."""
    wrong = []
    for task, judged in results.judged.get(setting, {}).get(method, {}).items():
        wanted = rows.get(task, set())
        wrong += [100 * (1 - score) for name, score in zip(judged.ids, judged.score, strict=True) if name in wanted]
    if not wrong:
        return None
    return results.bootstrap.mean({" ".join(sorted(rows)): np.array(wrong)}), len(wrong)


def _words(text: str) -> set[str]:
    return {word.lower() for word in WORD.findall(text)}
