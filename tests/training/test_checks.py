"""What is told before the work: figures as training itself comes to them, and every fault at once."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_language_model import tiny_model, tiny_tokenizer, write_tiny_model
from training.interrupted import train_tiny

from lorafleet.config import load_settings
from lorafleet.errors import TrainingError
from lorafleet.tasks import load_catalogue, load_corpus
from lorafleet.training import checks
from lorafleet.training.figures import model_size, row_figures
from lorafleet.training.rows import encode_examples
from lorafleet.training.speed import Speed, expected_seconds, speed_of_cards, timed_speed

RECIPE = {"rank": 4, "max_steps": 6, "max_tokens": 96, "accumulation": 2, "dtype": "float32", "checkpoint_steps": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_settings(base, tmp_path):
    def make(device="cpu", **training):
        return load_settings(
            state=tmp_path / "state", models={"base": str(base), "device": device}, training={**RECIPE, **training}
        )

    return make


@pytest.fixture(scope="module")
def corpus():
    settings = load_settings()
    return load_corpus(load_catalogue(settings.tasks)["wnli"], "train", settings.tasks)


def test_figures_are_those_that_the_card_will_have(make_settings, corpus, tmp_path):
    settings = make_settings(max_steps=None, epochs=1, max_tokens=250, accumulation=1)
    figures = row_figures(tiny_tokenizer(), corpus, settings.training)
    card = train_tiny(corpus, settings, tmp_path / "adapter")
    assert (figures.rows, figures.cut, figures.steps) == (card.rows, card.cut_rows, card.steps)
    assert 0 < figures.cut < figures.rows
    assert figures.tokens == card.tokens  # In one epoch each row is seen once.
    for tokenizer in (tiny_tokenizer(), tiny_tokenizer(adds_bos=False)):
        rows = encode_examples(tokenizer, 0, corpus.examples, max_tokens=250)
        figures = row_figures(tokenizer, corpus, make_settings(max_steps=8, batch=4, max_tokens=250).training)
        assert figures.cut == sum(row.cut for row in rows)
        assert figures.tokens == round(8 * 8 * sum(map(len, rows)) / len(rows))


def test_the_adapter_is_as_large_as_said_and_checkpoints_no_larger(make_settings, corpus, tmp_path):
    settings = make_settings()
    size = model_size(settings)
    assert size.parameters == sum(parameter.numel() for parameter in tiny_model().parameters())
    largest = 0

    def weigh(*_):
        nonlocal largest
        beside = sum(file.stat().st_size for file in tmp_path.rglob("*.pt"))
        largest = max(largest, beside)

    train_tiny(corpus, settings, tmp_path / "adapter", weigh)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    assert sum(weight.nbytes for weight in weights) == size.adapter_bytes
    assert largest > 0
    assert largest < size.disk_bytes(adapters=1, at_once=1, checkpoints=True)
    assert size.memory_bytes(settings.training, torch.bfloat16) < size.memory_bytes(settings.training, torch.float32)


def test_modules_that_the_model_does_not_have_are_named(make_settings):
    some = make_settings(modules=["q_proj", "qkv_proj"])
    assert checks.module_faults(some, model_size(some)) == []
    (warning,) = checks.module_warnings(some, model_size(some))
    assert "qkv_proj" in warning and "Did you mean" in warning
    none = make_settings(modules=["fc1"])
    (fault,) = checks.module_faults(none, model_size(none))
    assert "fc1" in fault and "q_proj" in fault


def test_all_contradictions_come_in_one_error(make_settings, tmp_path):
    settings = make_settings(device="cuda", backend="unsloth", workers=1, workers_per_adapter=9)
    faults = checks.setting_faults(settings)
    with pytest.raises(TrainingError) as refused:
        checks.refuse(faults)
    for part in (
        "models.device is cuda",
        "training.backend is unsloth",
        "training.workers = 1",
        "has training.batch",
        "(4)",
    ):
        assert part in str(refused.value)
    assert str(refused.value).startswith("4 things stand in the way")
    assert len(checks.setting_faults(make_settings(gpus_per_worker=0.5, workers_per_adapter=2, device="cpu"))) == 2
    assert checks.setting_faults(make_settings()) == []
    checks.refuse([])
    gone = load_settings(models={"base": str(tmp_path / "nowhere")})
    (fault,) = checks.base_faults(gone)
    assert "nowhere" in fault


def test_few_rows_one_sided_answers_and_cut_rows_are_named(make_settings, corpus):
    training = make_settings().training
    examples = corpus.examples[:20]
    same = replace(corpus, examples=tuple(replace(example, answers=(example.options[0],)) for example in examples))
    few = replace(corpus, examples=examples[:5])
    corpora = {"wnli": corpus, "same": same, "few": few}
    figures = {task: row_figures(tiny_tokenizer(), rows, training) for task, rows in corpora.items()}
    warnings = checks.row_warnings(corpora, figures, training)
    assert len(warnings) == 3
    assert warnings[0].startswith(f"same: the answer is {examples[0].options[0]!r} in 100% of its rows")
    assert warnings[1].startswith("few has 5 rows")
    longest = max(corpus.examples, key=lambda example: len(example.prompt))
    assert "training.max_tokens = 96" in warnings[2]
    assert f"wnli {figures['wnli'].cut} of {figures['wnli'].rows}" in warnings[2]
    assert " ".join(longest.key.split())[:40] in warnings[2]


def test_room_is_compared_with_what_there_is(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    assert checks.disk_faults(tmp_path / "not" / "there", free // 2) == []
    (fault,) = checks.disk_faults(tmp_path / "not" / "there", free * 2)
    assert "GiB left" in fault
    (tmp_path / "file").write_text("")
    (fault,) = checks.disk_faults(tmp_path / "file" / "state", 1)
    assert "is a file" in fault
    assert checks.memory_faults("node a", room=10, workers=2, needed=5) == []
    assert "node a" in checks.memory_faults("node a", room=10, workers=2, needed=6)[0]


def test_the_speed_is_measured_where_no_card_tells_it(make_settings, corpus):
    settings = make_settings()
    assert speed_of_cards(settings) is None
    timed = timed_speed(settings, corpus)
    assert timed.tokens_per_second > 0
    assert "wnli on the clock" in timed.source
    assert not Path(settings.state).exists()
    card = train_tiny(corpus, settings, settings.adapters / "one")
    known = speed_of_cards(settings)
    assert known is not None
    assert known.tokens_per_second == pytest.approx(card.tokens / card.seconds)
    other = settings.model_copy(update={"models": settings.models.model_copy(update={"base": "someone/else"})})
    assert speed_of_cards(other) is None


def test_the_time_is_that_of_the_last_place_to_be_free():
    speed = Speed(10, "")
    assert expected_seconds([40, 30, 20, 20], speed, 2) == pytest.approx(6)
    assert expected_seconds([40, 30], speed, 9) == pytest.approx(4)
    assert expected_seconds([40, 30], speed, 1) == pytest.approx(7)
