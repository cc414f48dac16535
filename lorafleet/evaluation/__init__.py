"""Methods under test on the evaluation rows of the tasks, all on the same rows, by the same scoring.

Reads from top to bottom: `under_test` (which composition each method gives a row), `metrics` (what an answer is worth),
`harness` (the table).
"""

from lorafleet.evaluation.harness import Evaluation, TaskScore, evaluate
from lorafleet.evaluation.under_test import UNDER_TEST

__all__ = ["UNDER_TEST", "Evaluation", "TaskScore", "evaluate"]
