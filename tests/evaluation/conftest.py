"""The rigged fleet, measured once for all tests that read its results."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from evaluation.rigged import BY_PLACE, rigged_settings

from lorafleet.config import Settings
from lorafleet.evaluation import Bench, choose_scorings, plan, run, variants
from lorafleet.evaluation.case_study import keep_case_study
from lorafleet.evaluation.harness import prepare
from lorafleet.evaluation.under_test import SETTINGS

RIVALS = ("smear", "adapter_soup", "arrow")
METHODS = ["base", "perfect", "selection", "cat", "linear", "cat@p=0.5", "cat@p=0.9", "cat@p=1.0", *BY_PLACE, *RIVALS]


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return rigged_settings(tmp_path_factory.mktemp("rigged"))


@pytest.fixture(scope="session")
def measured(settings: Settings) -> Iterator[Path]:
    """The folder of a run over all settings."""
    bench = Bench(settings)
    methods = variants(METHODS, SETTINGS)
    choose_scorings(bench)
    prepare(bench, methods)
    outcome = run(bench, plan(bench, methods, SETTINGS))
    assert not outcome.failed
    keep_case_study(bench)
    bench.close()
    return bench.folder
