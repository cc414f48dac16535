"""The packaged base model: a small table from the sample pack, and its score on real rows."""

import os
from pathlib import Path

import pytest

from lorafleet.config import Settings, load_settings
from lorafleet.evaluation import Bench, plan, read_results, run, variants
from lorafleet.evaluation.harness import prepare
from lorafleet.evaluation.plan import ASKED
from lorafleet.evaluation.records import Part, read_rows
from lorafleet.evaluation.report import write_report
from lorafleet.models import load_base_model, load_tokenizer
from lorafleet.tasks import load_catalogue, load_corpus
from lorafleet.training import adapter_name, train_adapter

HUB_ROOT = os.environ.get("HUB_ROOT")
METHODS = ["base", "perfect", "auto", "smear", "adapter_soup", "arrow"]
TRAINED = ("sst2", "copa")


def train(settings: Settings) -> None:
    """An adapter for each task, of a few steps."""
    model, tokenizer = load_base_model(settings.models), load_tokenizer(settings.models)
    for task in map(load_catalogue(settings.tasks).__getitem__, TRAINED):
        name = adapter_name(settings, task.name)
        corpus = load_corpus(task, "train", settings.tasks)
        train_adapter(model, tokenizer, corpus, settings, name, settings.adapters / name, lambda *_: None)


def likelihoods(bench: Bench, method: str, task: str) -> list[float]:
    """The log-likelihoods of the right answers."""
    predictions = read_rows(Part(task, "iid", method).path(bench.folder))
    examples = bench.rows(task).examples
    return [row["options"][e.options.index(e.answer)]["total"] for row, e in zip(predictions, examples, strict=True)]


@pytest.mark.integration
def test_a_small_table_from_the_sample_pack(tmp_path):
    recipe = {"rank": 4, "alpha": 8, "max_steps": 2, "warmup_steps": 1, "learning_rate": 3e-3, "max_tokens": 64}
    settings = load_settings(
        state=tmp_path, tasks={"names": [*TRAINED, "wic"]}, training=recipe, evaluation={"resamples": 200}
    )
    train(settings)
    bench, methods = Bench(settings, limit=3), variants(METHODS, ASKED["iid"])
    prepare(bench, methods)
    outcome = run(bench, plan(bench, methods, ASKED["iid"]))
    assert (outcome.failed, outcome.computed) == ({}, 2 * 6 + 5)

    results = read_results(bench.folder)
    _, markdown = write_report(results)
    for method in METHODS:
        mean = results.mean("iid", method)
        assert mean is not None and f"| {method} | {mean.value:.1f} |" in markdown.read_text()
    for task in TRAINED:
        for row in read_rows(Part(task, "iid", "auto").path(bench.folder)):
            assert max(row["weights"], key=lambda weight: weight[1])[0] == task
    own, base = (likelihoods(bench, method, "sst2") for method in ("perfect", "base"))
    assert sum(own) > sum(base), "a few steps teach which answers there are"
    bench.close()


@pytest.mark.integration
@pytest.mark.skipif(not HUB_ROOT, reason="needs real rows: HUB_ROOT")
def test_the_untouched_base_model_scores_on_real_rows_what_it_should(tmp_path):
    """Its model card has 66 on PIQA, scored as continuations; a harness that is off shows here."""
    settings = load_settings(state=tmp_path, tasks={"names": ["piqa", "story_cloze"], "hub_root": Path(str(HUB_ROOT))})
    bench, methods = Bench(settings, limit=50), variants(["base"], ASKED["held_out"])
    prepare(bench, methods)
    run(bench, plan(bench, methods, ASKED["held_out"]))
    bench.close()
    scores = read_results(bench.folder).scores("held_out", "base")
    assert scores["piqa"].mean() >= 62 and len(scores["piqa"]) == 50
    assert scores["story_cloze"].mean() >= 60 and len(scores["story_cloze"]) == 50
