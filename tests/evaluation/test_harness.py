"""The harness: answers known beforehand in all settings, and parts that are kept."""

import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluation.conftest import METHODS
from evaluation.rigged import SCORES, TEXTS, rigged_settings, write_adapter, write_rows

from lorafleet.config import load_settings
from lorafleet.engine.runner import Runner
from lorafleet.errors import SettingsError, UnknownAdapter
from lorafleet.evaluation import Bench, plan, read_results, run, variants
from lorafleet.evaluation.harness import prepare
from lorafleet.evaluation.ranking import ranked
from lorafleet.evaluation.records import Part, about, read_rows
from lorafleet.evaluation.scoring import read_choices
from lorafleet.evaluation.tables import tables_as_json
from lorafleet.evaluation.under_test import SETTINGS, variant
from lorafleet.weighing import make_weigher, read_places, write_places


def test_scores_are_the_known_ones(measured):
    results = read_results(measured)
    for setting, methods in SCORES.items():
        for method, tasks in methods.items():
            found = {task: scores.mean() for task, scores in results.scores(setting, method).items()}
            assert found == pytest.approx(tasks), (setting, method)
    spelled = results.judged["iid"]["perfect"]["spelling"]
    assert spelled.answers == ("v", "v", "v") and spelled.f1 is not None and spelled.f1.mean() == 1
    difference, share = results.against("ood", "base")
    assert difference.value == pytest.approx(25 / 3 - 275 / 3) and share.value == pytest.approx(100 * 25 / 275)
    assert "perfect" not in results.judged["ood"] and results.tasks_of("held_out") == ["weather"]


def test_records_hold_what_the_tables_are_computed_from(measured):
    (row, *_) = read_rows(measured / "predictions/ood/cat/fruit.parquet")
    weights = dict(row["weights"])
    assert set(weights) <= {"ships", "spelling"} and sum(weights.values()) == pytest.approx(1)
    assert row["ranked"] and "fruit" not in row["ranked"]
    assert [option["bytes"] for option in row["options"]] == [1, 1, 1]
    said = about(measured / "predictions/ood/cat/fruit.parquet")
    assert said["part"] == {"task": "fruit", "setting": "ood", "method": "cat", "split": "evaluation"}
    (base, *_) = read_rows(measured / "predictions/iid/base/fruit.parquet")
    assert not base["weights"] and max(base["options"], key=lambda option: option["total"]) is base["options"][2]


def test_what_a_query_finds_is_ranked_by_what_weighs(settings):
    for weigher in ("nucleus", "routed", "joint"):
        weighing = settings.weighing.model_copy(update={"weigher": weigher})
        by_weigher = settings.model_copy(update={"weighing": weighing})
        bench = Bench(by_weigher)
        for masked in (False, True):
            rows = bench.rows("fruit", masked=masked)
            found = ranked(bench, rows, by_weigher, "instruction")
            assert len(found) == len(rows.examples)
            for shares, evidence in zip(
                found, bench.evidence(rows, weighing.neighbours, "instruction", learned=True), strict=True
            ):
                assert sum(shares.values()) == pytest.approx(1)
                assert list(shares.values()) == sorted(shares.values(), reverse=True)
                assert ("fruit" in shares) == (not masked)
                by_name = make_weigher(weigher, {"k": 99, "sharpness": weighing.sharpness})
                weighed = by_name.weigh(evidence, bench.pool(rows.masked))
                assert shares == pytest.approx(weighed.shares if weigher == "nucleus" else dict(weighed))


def test_the_scoring_is_chosen_on_training_rows(measured):
    choices = read_choices(measured)
    assert set(choices) == {"fruit", "ships"}, "a free-text task has no options, one without training rows no choice"
    # The own adapter is always right on its training rows, and base never.
    assert choices["fruit"].accuracy == {"sum": 50, "token": 50, "byte": 50} and choices["fruit"].rows == 16


def test_methods_that_answer_in_their_own_way_leave_records_as_the_others(measured):
    for method, adapters in {"smear": 3, "adapter_soup": 3, "arrow": 3}.items():
        for setting, left in (("iid", 0), ("ood", 1)):
            for task in ("fruit", "spelling"):
                (row, *_) = read_rows(measured / f"predictions/{setting}/{method}/{task}.parquet")
                assert len(row["weights"]) == adapters - left and (task in dict(row["weights"])) == (setting == "iid")
                assert bool(row["options"]) == (task == "fruit") and (row["text"] is None) == (task == "fruit")
        (weather, *_) = read_rows(measured / f"predictions/held_out/{method}/weather.parquet")
        assert len(weather["options"]) == 3


def test_settings_are_compared_on_rows_that_are_not_for_evaluation(tmp_path):
    """A quarter of the training rows is kept from training and index, and asked."""
    tasks = {"names": ["fruit", "spelling", "weather"], "declarations": [tmp_path / "rows" / "tasks.yaml"]}
    own = rigged_settings(
        tmp_path, tasks={**tasks, "validation_share": 0.25}, evaluation={"answer_tokens": 1, "scoring_rows": 2}
    )
    bench = Bench(own)
    methods = variants(["perfect", "selection", "selection@abstain_below=1.0"], ("iid", "ood"))
    for split in ("validation", "train"):
        work = plan(bench, methods, ("iid", "ood"), split)
        assert len(work.parts) == 2 * 3 + 2 * 2, "weather has no training rows"
        prepare(bench, methods, split=split)
        assert not run(bench, work).failed
        results = read_results(bench.folder / split)
        scores = {method: results.mean("iid", method).value for method in results.methods("iid")}
        # Nothing is as near as 1.0, so that base answers, which is never right.
        assert scores == {"perfect": 100, "selection": 100, "selection@abstain_below=1.0": 0}
        assert {len(rows) for rows in results.scores("iid", "perfect").values()} == {2}
    bench.close()
    assert not (bench.folder / "predictions").exists() and not (bench.folder / "retrieval").exists()
    trained, kept = ({example.key for example in bench.corpus("fruit", split).examples} for split in ("train", "validation"))
    assert len(trained) == 6 and len(kept) == 2 and not trained & kept
    found = bench.neighbours(bench.rows("fruit", "validation"), 99, "instruction")
    assert not kept & {one.text for near in found for one in near}


def test_json_is_the_contract(measured):
    table = tables_as_json(read_results(measured, settings=("iid", "held_out")), "iid")
    base = table["methods"]["base"]
    assert base["mean"] == pytest.approx(25 / 3, abs=0.01)
    assert {task: (entry["score"], entry["rows"]) for task, entry in base["tasks"].items()} == {
        "fruit": (25.0, 4),
        "ships": (0.0, 5),
        "spelling": (0.0, 3),
        "weather": (66.67, 3),
    }
    assert table["methods"]["selection"]["to_perfect"]["per_cent"] == 100


def test_a_run_that_was_ended_goes_on_where_it_stopped(tmp_path, settings):
    own = rigged_settings(tmp_path)
    methods = variants(["base", "perfect", "selection"], SETTINGS)

    def missing() -> set[Part]:
        return set(plan(Bench(own), methods, SETTINGS).missing)

    everything = missing()
    assert len(everything) == 3 * 3 + 3 * 2 + 2
    done: list[str] = []

    def ends_after_four(rows: int, part: str) -> None:
        done.append(part)
        if len(done) == 4:
            raise KeyboardInterrupt

    bench = Bench(own)
    prepare(bench, methods)
    with pytest.raises(KeyboardInterrupt):
        run(bench, plan(bench, methods, SETTINGS), ends_after_four)
    left = missing()
    assert len(left) == len(everything) - 4 and {str(part) for part in everything - left} == set(done)
    outcome = run(bench, plan(bench, methods, SETTINGS))
    assert (outcome.kept, outcome.computed, outcome.failed) == (4, len(left), {})
    bench.close()
    assert not missing()
    assert not list(bench.folder.rglob(".*")), "nothing half written is left"

    # Other weights of one adapter: everything that could have used it is measured anew, and nothing else.
    write_adapter(own.adapters / "ships", direction=3)
    changed = missing()
    assert {part for part in changed if part.method == "perfect"} == {Part("ships", "iid", "perfect")}
    assert {part.task for part in changed if part.setting == "ood"} == {"fruit", "spelling"}
    assert not any(part.method == "base" for part in changed)
    # Other evaluation rows: all parts of their task.
    write_adapter(own.adapters / "ships", direction=2)
    assert not missing()
    write_rows(tmp_path / "rows" / "fruit.jsonl", [("a pear", "x")])
    assert {part.task for part in missing()} == {"fruit"} and len(missing()) == 5


def test_tables_leave_out_what_would_not_be_computed_so_today(tmp_path):
    settings = rigged_settings(tmp_path)
    methods = variants(["base", "perfect"], SETTINGS)

    def evaluated():
        bench = Bench(settings)
        work = plan(bench, methods, SETTINGS)
        prepare(bench, methods)
        outcome = run(bench, work)
        bench.close()
        return read_results(bench.folder, parts=outcome.parts)

    assert set(evaluated().scores("held_out", "base")) == {"weather"}
    # Where a task has come to an adapter, its answers without one are of before; also where no plan says so.
    time.sleep(1.1)
    write_adapter(settings.adapters / "weather", direction=1)
    results = evaluated()
    assert "held_out" not in results.settings and "weather" in results.scores("iid", "base")
    everything = read_results(results.folder)
    assert everything.settings == results.settings and everything.scores("iid", "base").keys() == set(TEXTS)
    # Other weights, and nothing computed with them yet.
    write_adapter(settings.adapters / "ships", direction=3)
    today = plan(Bench(settings), methods, SETTINGS).parts
    assert set(read_results(results.folder, parts=today).scores("iid", "perfect")) == set(TEXTS) - {"ships"}


def test_a_task_that_is_scored_otherwise_is_judged_so(tmp_path):
    settings = rigged_settings(tmp_path)
    path, declared = settings.state / "evaluation" / "rows" / "fruit.parquet", tmp_path / "rows" / "tasks.yaml"
    prepare(Bench(settings), [variant("base")])
    before = about(path)["scoring"]
    declared.write_text(declared.read_text().replace("fruit:\n", "fruit:\n  scoring: byte\n"))
    prepare(Bench(settings), [variant("base")])
    assert before != "byte" and about(path)["scoring"] == "byte"


def test_who_was_trained_on_everything_is_out_of_reach_without_being_named(tmp_path):
    settings = rigged_settings(tmp_path)
    write_adapter(settings.adapters / "everything", direction=1)
    bench = Bench(settings)
    assert "everything" in bench.pool()
    roster = bench.roster
    card = SimpleNamespace(training={"together": "everything"})
    bench = Bench(settings)
    bench.__dict__["roster"] = roster.having(replace(roster.adapters["everything"], card=card))
    assert set(bench.pool("ships")) == {"fruit", "spelling"}


def test_a_part_that_fails_does_not_stop_the_others(tmp_path):
    own = rigged_settings(tmp_path, generation={"rows": 4, "longest": 128})
    write_rows(tmp_path / "rows" / "ships.jsonl", [("a long ship " * 40, "y")])
    bench = Bench(own)
    outcome = run(bench, plan(bench, variants(["base"], ("iid",)), ("iid",)))
    bench.close()
    assert [part.task for part in outcome.failed] == ["ships"] and outcome.computed == 2
    assert "generation.longest" in next(iter(outcome.failed.values()))


@pytest.mark.parametrize("failures", [1, 99])
def test_a_part_without_memory_is_tried_once_more(tmp_path, monkeypatch, failures):
    bench, methods = Bench(rigged_settings(tmp_path)), variants(["perfect"], ["iid"])
    prepare(bench, methods)
    passes, computed = [], Runner.prefill

    def short_of_memory(runner, segments):
        passes.append(segments)
        if len(passes) <= failures:
            raise torch.OutOfMemoryError("no room")
        return computed(runner, segments)

    # What a GPU does, in the engine's thread; the engine has to live on.
    monkeypatch.setattr(Runner, "prefill", short_of_memory)
    outcome = run(bench, plan(bench, methods, ["iid"]))
    bench.close()
    if failures == 1:
        assert (outcome.computed, outcome.failed) == (len(SCORES["iid"]["perfect"]), {})
        found = {task: scores.mean() for task, scores in read_results(bench.folder).scores("iid", "perfect").items()}
        assert found == pytest.approx(SCORES["iid"]["perfect"])
    else:
        assert outcome.computed == 0 and set(outcome.failed.values()) == {"OutOfMemoryError: no room"}


def test_a_training_row_is_not_its_own_neighbour(settings):
    bench = Bench(settings)
    rows = bench.rows("fruit", "train")
    found = bench.neighbours(rows, 12, "instruction")
    assert [len(near) for near in found] == [12] * 8
    assert not any(example.key in [one.text for one in near] for example, near in zip(rows.examples, found, strict=True))
    masked = bench.neighbours(bench.rows("fruit", masked=True), 12, "bare")
    assert {one.task for near in masked for one in near} == {"ships", "spelling"}


def test_what_the_router_has_learned_is_kept_for_those_who_answer(tmp_path):
    settings = rigged_settings(tmp_path, weighing={"neighbours": 12, "weigher": "nucleus"})
    prepare(Bench(settings), [variant("base"), variant("linear")])
    folder = settings.state / "evaluation-keys"
    assert not list(folder.glob("*.npz")), "nobody goes by it"
    prepare(Bench(settings), [variant("moe_top1")])
    (kept,) = folder.glob("*.npz")
    places = read_places(kept, kept.stem)
    assert places is not None and places.router is not None
    write_places(kept, replace(places, router=replace(places.router, biases=places.router.biases + 900)))
    assert Bench(settings).places.router.biases.min() > 800, "it is read, not learned"
    kept.write_bytes(b"damaged")
    learned = Bench(settings).places
    assert np.array_equal(learned.router.weights, places.router.weights)
    assert np.allclose(learned.prototypes.vectors, Bench(settings).prototypes.vectors, atol=1e-6)


def test_methods_and_their_variants_by_name(settings):
    changed = variant("softmax@k=5@temperature=0.1@query=bare").apply(settings)
    assert (changed.weighing.weigher, changed.weighing.k, changed.weighing.temperature) == ("softmax", 5, 0.1)
    assert changed.evaluation.query == "bare" and settings.evaluation.query == "instruction"
    assert variant("ties@density=0.2@weigher=uniform").apply(settings).composing.density == 0.2
    assert "perfect" not in [one.name for one in variants(None, ("ood",))]
    for name, message in {
        "linaer": "Did you mean linear",
        "linear@q=1": "cannot change 'q=1'",
        "linear@p": "cannot change 'p'",
        "linear@p=[a": "p is '\\[a'",
    }.items():
        with pytest.raises(SettingsError, match=message):
            variants([name], SETTINGS)
    with pytest.raises(SettingsError, match="p is 7"):
        variant("linear@p=7").apply(settings)
    with pytest.raises(SettingsError, match="perfect has no meaning"):
        variants(["perfect"], ("ood",))


def test_it_needs_neither_ray_nor_chroma_nor_datasets():
    """A machine with a GPU and little else is enough to measure on."""
    missing = "import sys; sys.modules.update(dict.fromkeys(('ray', 'chromadb', 'datasets')))"
    subprocess.run([sys.executable, "-c", f"{missing}; import lorafleet.evaluation.report"], check=True)


def test_without_adapters_base_alone_can_be_measured(tmp_path):
    settings = load_settings(state=tmp_path, tasks={"names": ["story_cloze", "squad"]})
    bench = Bench(settings, limit=4)
    with pytest.raises(UnknownAdapter, match="lorafleet train"):
        plan(bench, variants(["linear"], SETTINGS), SETTINGS)
    assert set(plan(bench, variants(["base"], SETTINGS), SETTINGS).parts) == {
        Part("story_cloze", "held_out", "base"),
        Part("squad", "held_out", "base"),
    }


def test_shares_of_the_work_are_the_whole(settings):
    work = plan(Bench(settings), variants(METHODS, SETTINGS), SETTINGS, force=True)
    shares = [work.share(number, 3).missing for number in (1, 2, 3)]
    assert sorted(part for share in shares for part in share) == sorted(work.missing)
