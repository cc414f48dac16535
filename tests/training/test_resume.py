"""A training that was stopped, at whatever moment, gives the adapter of one that was not."""

import logging
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_language_model import write_tiny_model
from training.interrupted import Stopped, killed_at_file_event, stop_at, train_tiny

from lorafleet.config import load_settings
from lorafleet.tasks import load_catalogue, load_corpus
from lorafleet.training import read_card
from lorafleet.training.checkpoints import Checkpoints, checkpoint_folder, read_checkpoint
from lorafleet.training.randomness import random_state, restore_random_state, seeded

STEPS = 7
RECIPE = {
    "rank": 4,
    "max_steps": STEPS,
    "accumulation": 2,
    "learning_rate": 0.02,
    "dropout": 0.3,
    "max_tokens": 64,
    "backend": "peft",
    "dtype": "float32",
    "checkpoint_steps": 2,
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    base = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    return load_settings(models={"base": str(base), "device": "cpu"}, training=RECIPE)


@pytest.fixture(scope="module")
def corpus(settings):
    whole = load_corpus(load_catalogue(settings.tasks)["copa"], "train", settings.tasks)
    return replace(whole, examples=whole.examples[:12])


@pytest.fixture(scope="module")
def undisturbed(settings, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "adapter"
    train_tiny(corpus, settings, folder)
    return folder


def changed(settings, **training):
    return settings.model_copy(update={"training": settings.training.model_copy(update=training)})


def same(one, other):
    files = ("adapter_model.safetensors", "adapter_config.json")
    return all((one / file).read_bytes() == (other / file).read_bytes() for file in files)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_stopped_after_any_step_it_goes_on_from_its_checkpoint_to_the_same_bytes(
    step, settings, corpus, undisturbed, tmp_path
):
    folder = tmp_path / "adapter"
    with pytest.raises(Stopped):
        train_tiny(corpus, settings, folder, stop_at(step))
    assert not folder.exists()
    steps = []
    card = train_tiny(corpus, settings, folder, lambda step, loss: steps.append(step))
    kept = min(step, STEPS - 1) // 2 * 2
    assert steps == list(range(kept + 1, STEPS + 1))
    assert card.resumed == ([kept] if kept else [])
    assert same(folder, undisturbed)
    before = read_card(undisturbed)
    assert (card.losses, card.first_loss, card.last_loss, card.tokens) == (
        before.losses,
        before.first_loss,
        before.last_loss,
        before.tokens,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.drill
def test_killed_before_any_change_of_a_file_it_ends_the_same_and_leaves_nothing(settings, corpus, tmp_path):
    """An older adapter lies in its place: that one, the new one or none is seen there, and nothing in between."""
    short = changed(settings, max_steps=3, checkpoint_steps=1, accumulation=1)
    older, undisturbed = tmp_path / "older" / "adapter", tmp_path / "undisturbed" / "adapter"
    train_tiny(corpus, changed(short, seed=5), older)
    train_tiny(corpus, short, undisturbed)
    number, resumed = 1, 0
    while True:
        folder = tmp_path / str(number) / "adapter"
        shutil.copytree(older, folder)
        if not killed_at_file_event(corpus, short, folder, number):
            break
        if folder.exists():
            assert same(folder, older) or same(folder, undisturbed)
            assert read_card(folder) is not None
        card = train_tiny(corpus, short, folder)
        assert same(folder, undisturbed)
        assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
        resumed += card.resumed != []
        number += 1
    assert number > 20
    assert resumed > 10


def test_killed_again_and_again_it_comes_to_its_end(settings, corpus, undisturbed, tmp_path):
    folder = tmp_path / "adapter"
    often = changed(settings, checkpoint_steps=1)
    kills = 0
    # Every process comes a little further: at first to one checkpoint or two of six, at last to the adapter.
    while killed_at_file_event(corpus, often, folder, 16 + 2 * kills):
        kills += 1
        assert kills < 20
    assert kills >= 2
    assert same(folder, undisturbed)
    card = read_card(folder)
    assert card is not None
    assert len(card.resumed) >= 2
    assert card.resumed == sorted(set(card.resumed))


@pytest.mark.parametrize("damage", ["cut", "a bit", "empty"])
def test_a_damaged_checkpoint_is_warned_of_and_the_one_before_taken(damage, settings, corpus, undisturbed, tmp_path, caplog):
    folder = tmp_path / "adapter"
    with pytest.raises(Stopped):
        train_tiny(corpus, settings, folder, stop_at(5))
    older, newest = sorted(checkpoint_folder(folder).iterdir())
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes({"cut": content[:-100], "a bit": content, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        card = train_tiny(corpus, settings, folder)
    assert newest.name in caplog.text
    assert older.name not in caplog.text
    assert card.resumed == [2]
    assert same(folder, undisturbed)


def test_without_a_whole_checkpoint_it_begins_anew(settings, corpus, undisturbed, tmp_path, caplog):
    folder = tmp_path / "adapter"
    with pytest.raises(Stopped):
        train_tiny(corpus, settings, folder, stop_at(5))
    for checkpoint in checkpoint_folder(folder).iterdir():
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert train_tiny(corpus, settings, folder).resumed == []
    assert caplog.text.count("is damaged") == 2
    assert same(folder, undisturbed)


@pytest.mark.parametrize("change", ["rows", "recipe", "base"])
def test_a_checkpoint_of_another_training_is_let_be_and_goes_when_the_adapter_is_done(
    change, settings, corpus, undisturbed, tmp_path
):
    folder = tmp_path / "adapter"
    other_corpus, other = corpus, settings
    if change == "rows":
        other_corpus = replace(corpus, examples=corpus.examples[1:])
    elif change == "recipe":
        other = changed(settings, seed=5)
    else:
        from safetensors.torch import load_file, save_file

        base = write_tiny_model(tmp_path / "base")
        weights = load_file(base / "model.safetensors")
        save_file({name: weight * 1.5 for name, weight in weights.items()}, base / "model.safetensors", {"format": "pt"})
        other = settings.model_copy(update={"models": settings.models.model_copy(update={"base": str(base)})})
    with pytest.raises(Stopped):
        train_tiny(other_corpus, other, folder, stop_at(5))
    with pytest.raises(Stopped):
        train_tiny(corpus, settings, folder, stop_at(3))
    assert len(list(checkpoint_folder(folder).iterdir())) == 3
    assert train_tiny(corpus, settings, folder).resumed == [2]
    assert same(folder, undisturbed)
    assert not checkpoint_folder(folder).exists()


def test_other_places_and_workers_go_on_from_the_same_checkpoint(settings, corpus, undisturbed, tmp_path):
    placed = changed(settings, workers=3, cpus_per_worker=0.5, checkpoint_steps=0)
    with pytest.raises(Stopped):
        train_tiny(corpus, settings, tmp_path / "adapter", stop_at(5))
    card = train_tiny(corpus, placed, tmp_path / "adapter")
    assert card.resumed == [4]
    assert same(tmp_path / "adapter", undisturbed)


def test_zero_steps_mean_no_checkpoint(settings, corpus, tmp_path):
    never = changed(settings, checkpoint_steps=0)
    with pytest.raises(Stopped):
        train_tiny(corpus, never, tmp_path / "adapter", stop_at(6))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_cannot_be_written_is_warned_of_and_training_goes_on(
    settings, corpus, undisturbed, tmp_path, caplog
):
    checkpoint_folder(tmp_path / "adapter").write_text("a file where the folder should be")
    train_tiny(corpus, settings, tmp_path / "adapter")
    assert "no checkpoint of step 2" in caplog.text
    assert same(tmp_path / "adapter", undisturbed)


def test_two_are_kept_and_hold_what_was_written(tmp_path):
    checkpoints = Checkpoints(tmp_path / "adapter", "f")
    for step in (9, 10, 100):
        checkpoints.write(step, {"step": step, "weights": {"a": torch.full((3,), float(step))}})
    assert len(list(checkpoint_folder(tmp_path / "adapter").iterdir())) == 2
    newest = checkpoints.newest()
    assert newest is not None
    found = read_checkpoint(newest)
    assert found["step"] == 100
    assert torch.equal(found["weights"]["a"], torch.full((3,), 100.0))


def test_random_numbers_go_on_after_a_file_and_the_callers_are_not_touched(tmp_path):
    import random

    import numpy

    def draw():
        return random.random(), float(numpy.random.normal()), float(torch.rand(()))

    device = torch.device("cpu")
    with seeded(-1, device):
        draw()
        Checkpoints(tmp_path / "adapter", "f").write(1, random_state(device))
        expected = draw()
    random.seed(3)
    numpy.random.seed(3)
    torch.manual_seed(3)
    with seeded(4, device):
        assert draw() != expected
        newest = Checkpoints(tmp_path / "adapter", "f").newest()
        assert newest is not None
        restore_random_state(read_checkpoint(newest), device)
        assert draw() == expected
    after = draw()
    random.seed(3)
    numpy.random.seed(3)
    torch.manual_seed(3)
    assert draw() == after
