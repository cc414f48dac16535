"""The methods that do more than weigh neighbours, each by something that only a right one has."""

import json
import shutil
import sys

import numpy as np
import pytest
from evaluation.rigged import LETTERS, LOUDER, rigged_settings, write_rows
from small_fleet import save_adapter
from tiny_language_model import EOS, write_tiny_model
from transformers import GenerationConfig

from lorafleet.composition import Composition
from lorafleet.engine import GenerationRequest, ScoreRequest
from lorafleet.errors import AdapterError, LoRAFleetError
from lorafleet.evaluation import Bench, arrow, lorahub, plan, variants
from lorafleet.evaluation.averaging import averaged
from lorafleet.evaluation.under_test import SETTINGS, variant
from lorafleet.weighing import Places, Router


@pytest.fixture(scope="module")
def random_bench(tmp_path_factory):
    """The same rows before a model and adapters that are random, so that every number counts."""
    folder = tmp_path_factory.mktemp("random")
    settings = rigged_settings(folder, evaluation={"answer_tokens": 8})
    settings = settings.model_copy(
        update={
            "state": folder / "random",
            "models": settings.models.model_copy(update={"base": str(write_tiny_model(folder / "tiny"))}),
        }
    )
    # Many tokens end answers, so that some of these end early.
    GenerationConfig(eos_token_id=[EOS, *range(30, 250, 4)]).save_pretrained(folder / "tiny")
    for seed, task in enumerate(LETTERS):
        save_adapter(settings.adapters / task, seed)
    bench = Bench(settings)
    yield bench
    bench.close()


def composed(bench, method, task, masked=False):
    one, rows = variant(method), bench.rows(task, masked=masked)
    return one.method.compose(bench, rows, one.apply(bench.settings))


def totals(scored):
    return np.array([[option.total for option in options] for options in scored])


def test_arrow_with_one_adapter_is_that_adapter(random_bench, monkeypatch):
    monkeypatch.setattr(arrow, "PASS_TOKENS", 250)  # Passes of a few rows of several lengths, padded.
    examples = [example for task in ("fruit", "ships") for example in random_bench.rows(task).examples]
    prompts, options = [example.prompt for example in examples], [("x", "a longer one", "y z")] * len(examples)
    for task in ("ships", "spelling"):
        random_bench.arrow.take([task])
        alone = Composition("cat", {task: 1.0})
        asked = [ScoreRequest(*pair, alone) for pair in zip(prompts, options, strict=True)]
        scored, wanted = random_bench.arrow.score(prompts, options), random_bench.engine.score(asked)
        assert totals(scored) == pytest.approx(totals(wanted), abs=1e-3)
        assert [(o.tokens, o.bytes) for row in scored for o in row] == [(o.tokens, o.bytes) for row in wanted for o in row]
        generated = random_bench.engine.generate([GenerationRequest(text, alone, 8, stop=("\n",)) for text in prompts])
        assert random_bench.arrow.generate(prompts, 8) == [one.text for one in generated]
        assert any(one.finish_reason == "stop" and "\n" not in one.text for one in generated)
    random_bench.arrow.take(list(LETTERS))
    assert np.abs(totals(random_bench.arrow.score(prompts, options)) - totals(wanted)).max() > 0.1, "it routes over all"


def test_arrow_leaves_the_masked_adapter_out_and_refuses_unlike_ones(random_bench, tmp_path):
    (one, *_) = composed(random_bench, "arrow", "ships", masked=True)
    assert set(one.weights) == {"fruit", "spelling"}
    copy = shutil.copytree(random_bench.settings.state, tmp_path / "state")
    save_adapter(copy / "adapters" / "fruit", rank=2)
    unlike = Bench(random_bench.settings.model_copy(update={"state": copy}))
    with pytest.raises(AdapterError, match="arrow needs adapters of one rank on the same layers: fruit has rank 2"):
        _ = unlike.arrow


def test_the_average_of_an_adapter_and_its_copy_is_the_adapter(random_bench, tmp_path):
    copied = random_bench.settings.model_copy(update={"state": tmp_path})
    for name in ("ships", "copy"):
        shutil.copytree(random_bench.settings.adapters / "ships", copied.adapters / name)
    bench = Bench(copied)
    half = averaged(bench, {"ships": 0.5, "copy": 0.5}, copied)
    example = random_bench.rows("ships").examples[0]
    ways = [half, averaged(bench, {"ships": 1.0}, copied), Composition("cat", {"ships": 1.0})]
    scored = totals(bench.engine.score([ScoreRequest(example.prompt, example.options, way) for way in ways]))
    bench.close()
    assert scored[0] == pytest.approx(scored[1], abs=1e-4) and scored[1] == pytest.approx(scored[2], abs=1e-4)


def test_smear_with_a_router_that_is_certain_is_the_adapter(settings):
    bench = Bench(settings)
    sizes = np.zeros((3, bench.embed(["text"]).shape[1]), np.float32)
    bench.__dict__["places"] = Places(bench.prototypes, Router(tuple(LETTERS), sizes, np.array([900, 0, 0], np.float32)))
    assert composed(bench, "smear", "ships") == [Composition("linear", {"fruit": 1.0})] * 5
    unsure = Router(tuple(LETTERS), sizes, np.log(np.array([6, 3, 1], np.float32)))
    bench.__dict__["places"] = Places(bench.prototypes, unsure)
    (first, *_) = composed(bench, "smear", "ships")
    assert first.method == "linear" and dict(first.weights) == pytest.approx(
        {"fruit": 0.36, "ships": 0.09, "spelling": 0.01}
    )
    (masked, *_) = composed(bench, "smear", "fruit", masked=True)
    assert dict(masked.weights) == pytest.approx({"ships": 0.75**2, "spelling": 0.25**2})


def test_a_soup_is_chosen_for_a_task_by_its_training_rows_alone(tmp_path):
    settings = rigged_settings(tmp_path, weighing={"k": 2})
    before = composed(Bench(settings), "adapter_soup", "ships")
    assert len(before) == 5 and all(one is before[0] for one in before)
    assert before[0].method == "linear" and len(before[0].weights) == 2
    assert dict(before[0].weights) == pytest.approx(dict.fromkeys(before[0].weights, 0.25)) and "ships" in before[0].weights
    assert set(composed(Bench(settings), "adapter_soup", "ships", masked=True)[0].weights) == {"fruit", "spelling"}
    assert len(composed(Bench(settings), "adapter_soup", "weather")[0].weights) == 2, "known by its instruction"
    # Evaluation rows as of another task change nothing, training rows do.
    rows = (tmp_path / "rows" / "spelling_train.jsonl").read_text().splitlines()
    write_rows(tmp_path / "rows" / "ships.jsonl", [(json.loads(row)["text"], "x") for row in rows])
    (again, *_) = composed(Bench(settings), "adapter_soup", "ships")
    assert again == before[0]


def test_lorahub_finds_the_adapter_that_answers_the_training_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(lorahub, "GENERATIONS", 8)
    # With an adapter blank and letter are as likely: the loss of its own rows is that of a choice between two tokens.
    bench = Bench(rigged_settings(tmp_path, blank=LOUDER))
    rows, found = bench.rows("fruit"), composed(bench, "lorahub", "fruit")
    assert len(found) == 4 and all(one is found[0] for one in found)
    weights = found[0].weights
    assert max(weights, key=lambda task: abs(weights[task])) == "fruit"
    answers = variant("lorahub").method.answer(bench, rows, found)
    (best,) = {max(answer.options, key=lambda option: option.total).option for answer in answers}
    assert best == "x"
    assert "fruit" not in composed(bench, "lorahub", "fruit", masked=True)[0].weights
    bench.close()
    works = plan(bench, variants(["lorahub"], SETTINGS), SETTINGS).parts
    assert {part.task for part in works} == {"fruit", "ships", "spelling"}, "weather has no rows to learn from"


def test_a_search_ends_near_the_least_loss_and_within_its_bounds():
    target = np.array([0.7, 0.0, -0.4, 9.0])

    def losses(candidates):
        assert len(candidates) == lorahub.POPULATION
        return [float(np.square(candidate - target).sum()) for candidate in candidates]

    found = lorahub.search(losses, 4, seed=3)
    assert found[:3] == pytest.approx(target[:3], abs=0.1) and found[3] == pytest.approx(lorahub.BOUND, abs=0.1)
    assert np.array_equal(found, lorahub.search(losses, 4, seed=3))


def test_without_the_package_that_searches_lorahub_is_left_out_or_says_so(monkeypatch):
    assert "lorahub" in {one.name for one in variants(None, SETTINGS)}
    monkeypatch.setattr(sys.modules["lorafleet.evaluation.plan"], "SEARCH_PACKAGE", "no_such_package")
    assert "lorahub" not in {one.name for one in variants(None, SETTINGS)}
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(LoRAFleetError, match=r"lorafleet\[search\]"):
        lorahub.search(lambda candidates: [0.0] * len(candidates), 2, seed=0)
