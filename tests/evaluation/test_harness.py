"""The harness: answers known beforehand, the settings iid and ood, and the untouched base model on real rows."""

import os
from pathlib import Path

import pytest

from lorafleet.config import load_settings
from lorafleet.engine import OptionScore
from lorafleet.errors import SettingsError
from lorafleet.evaluation import UNDER_TEST, evaluate
from lorafleet.evaluation.harness import methods_under_test
from lorafleet.evaluation.metrics import best_option, exact_match
from lorafleet.fleet import Fleet
from lorafleet.weighing import TaskWeights

HUB_ROOT = os.environ.get("HUB_ROOT")


def test_options_are_compared_by_sum_token_or_byte():
    scores = [OptionScore("yes", -2.0, 1, 3), OptionScore("no way at all", -4.0, 4, 13), OptionScore("no", -2.5, 2, 2)]
    assert best_option(scores, "sum") == "yes"
    assert best_option(scores, "token") == "no way at all"
    assert best_option(scores, "byte") == "no way at all"
    assert best_option([scores[0], scores[2]], "token") == "no"


def test_exact_match_forgives_case_articles_punctuation_and_blanks():
    assert exact_match(" The  Eiffel Tower. ", ["Louvre", "eiffel tower"])
    assert not exact_match("Eiffel Tower in Paris", ["Eiffel Tower"])
    assert not exact_match("", ["a thing"])


def test_what_each_method_gives_a_row():
    weights = TaskWeights({"rte": 0.6, "cb": 0.4})
    given = {name: dict(method.weights("mnli", weights)) for name, method in UNDER_TEST.items()}
    assert given["base"] == {}
    assert given["perfect"] == {"mnli": 1.0}
    assert given["selection"] == {"rte": 1.0}
    assert all(given[name] == {"rte": 0.6, "cb": 0.4} for name in ("linear", "cat", "ties", "magnitude_prune"))


def test_methods_without_meaning_are_refused():
    assert "perfect" not in methods_under_test(None, "ood")
    with pytest.raises(SettingsError, match="perfect has no meaning"):
        methods_under_test(["perfect"], "ood")
    with pytest.raises(SettingsError, match="Did you mean linear"):
        methods_under_test(["linaer"], "iid")


@pytest.mark.integration
def test_base_needs_neither_index_nor_adapters(tmp_path):
    settings = load_settings(state=tmp_path, tasks={"names": ["story_cloze", "squad"]})
    table = evaluate(Fleet(settings), methods=["base"], limit=4).as_json()["methods"]["base"]
    assert {task: score["rows"] for task, score in table["tasks"].items()} == {"story_cloze": 4, "squad": 4}
    assert all(score["score"] in (0, 25, 50, 75, 100) for score in table["tasks"].values())


@pytest.mark.integration
@pytest.mark.skipif(not HUB_ROOT, reason="needs real rows: HUB_ROOT")
def test_the_untouched_base_model_scores_on_real_rows_what_it_should(every_core, tmp_path):
    """Its model card has 66 on PIQA, scored as continuations; a harness that is off shows here."""
    settings = load_settings(state=tmp_path, tasks={"names": ["piqa", "story_cloze"], "hub_root": Path(str(HUB_ROOT))})
    table = evaluate(Fleet(settings), methods=["base"]).scores["base"]
    assert table["piqa"].score >= 62 and table["piqa"].rows == 200
    assert table["story_cloze"].score >= 60 and table["story_cloze"].rows == 250
