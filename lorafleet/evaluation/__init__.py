"""Methods under test on the evaluation rows of the tasks, all on the same rows, by the same scoring.

Reads from top to bottom: `queries` (what of a row is embedded), `bench` (the fleet that is measured), `answering` (rows to
answers), `averaging`, `soup`, `lorahub` and `arrow` (what rivals do beyond weighing neighbours), `under_test` (which
composition each method gives a row), `records` (predictions as files), `plan` (what there is to measure, and what is kept),
`scoring` (how options are compared), `harness` (computes what is missing), `case_study`, `finding` (how often the own task
is found).
From there on files are enough: `metrics` (what an answer is worth), `intervals` (the bootstrap), `results` (the tables),
`errors_by_rule` (on which rows methods err), `published` (the papers' figures), `report` (a page of it all).
"""

from lorafleet.evaluation.bench import Bench, Rows
from lorafleet.evaluation.harness import Outcome, choose_scorings, run
from lorafleet.evaluation.plan import Plan, plan, variants
from lorafleet.evaluation.results import Results, read_results
from lorafleet.evaluation.under_test import UNDER_TEST, MethodUnderTest

__all__ = [
    "UNDER_TEST",
    "Bench",
    "MethodUnderTest",
    "Outcome",
    "Plan",
    "Results",
    "Rows",
    "choose_scorings",
    "plan",
    "read_results",
    "run",
    "variants",
]
