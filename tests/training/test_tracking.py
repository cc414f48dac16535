"""What a training tells TensorBoard and Weights & Biases; and that it is the same training when they cannot be told."""

import logging
from dataclasses import replace

import pytest
from tiny_language_model import write_tiny_model
from training.interrupted import Stopped, stop_at, train_tiny

from lorafleet.config import load_settings
from lorafleet.tasks import load_catalogue, load_corpus
from lorafleet.training import is_current, tracking

RECIPE = {
    "rank": 4,
    "max_steps": 5,
    "batch": 2,
    "max_tokens": 64,
    "backend": "peft",
    "dtype": "float32",
    "checkpoint_steps": 2,
}


@pytest.fixture
def settings(tmp_path):
    base = write_tiny_model(tmp_path / "tiny")
    return load_settings(models={"base": str(base), "device": "cpu"}, training=RECIPE, state=tmp_path / "state")


@pytest.fixture
def corpus(settings):
    whole = load_corpus(load_catalogue(settings.tasks)["copa"], "train", settings.tasks)
    return replace(whole, examples=whole.examples[:12])


def tracked_by(settings, tracker):
    return settings.model_copy(update={"training": settings.training.model_copy(update={"tracking": tracker})})


def test_tensorboard_reads_every_step_of_a_resumed_run_once_and_the_cards_figures(settings, corpus):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = tracked_by(settings, "tensorboard")
    with pytest.raises(Stopped):
        train_tiny(corpus, shown, settings.adapters / "name", stop_at(3))
    card = train_tiny(corpus, shown, settings.adapters / "name")
    assert card.resumed == [2]
    events = accumulator.EventAccumulator(str(settings.state / "tracking" / "name"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5]
    assert [loss for _, loss in losses] == pytest.approx(card.losses, abs=1e-4)
    rates = [event.value for event in events.Scalars("learning_rate")]
    assert max(rates) == pytest.approx(settings.training.learning_rate)
    assert rates[-1] < max(rates)
    (last,) = events.Scalars("card/last_loss")
    assert last.value == pytest.approx(card.last_loss, rel=1e-5)
    assert is_current(card, corpus, settings)


def test_wandb_writes_a_run_without_a_network(settings, corpus, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    card = train_tiny(corpus, tracked_by(settings, "wandb"), settings.adapters / "name")
    (file,) = (settings.state / "tracking").rglob("run-*.wandb")
    content = file.read_bytes()
    assert content.count(b"learning_rate") >= card.steps
    for told in (b"last_loss", str(card.tokens).encode(), b"gate_proj"):
        assert told in content


def test_a_tracker_that_fails_is_warned_of_once_and_the_adapter_is_the_same(settings, corpus, caplog):
    pytest.importorskip("tensorboard")
    train_tiny(corpus, settings, settings.adapters / "plain")
    (settings.state / "tracking").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        train_tiny(corpus, tracked_by(settings, "tensorboard"), settings.adapters / "tracked")
    assert caplog.text.count("training goes on") == 1
    plain, same = (settings.adapters / name / "adapter_model.safetensors" for name in ("plain", "tracked"))
    assert plain.read_bytes() == same.read_bytes()


def test_a_tracker_that_never_answers_does_not_hold_the_training_up(settings, corpus, caplog, monkeypatch):
    import threading

    answered = threading.Event()
    monkeypatch.setattr(tracking, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(tracking, "_TensorBoard", lambda *_: answered.wait(60))
    with caplog.at_level(logging.WARNING):
        card = train_tiny(corpus, tracked_by(settings, "tensorboard"), settings.adapters / "name")
    answered.set()
    assert card.steps == 5
    assert "has not told everything" in caplog.text
