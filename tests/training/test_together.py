"""Several processes train one adapter: it is the adapter of one process, and none is left waiting for another."""

from dataclasses import replace

import pytest
from safetensors.torch import load_file
from tiny_language_model import write_tiny_model
from torch import allclose
from training.interrupted import train_tiny
from training.together import trained_together

from lorafleet.config import load_settings
from lorafleet.tasks import load_catalogue, load_corpus
from lorafleet.training import read_card
from lorafleet.training.checkpoints import checkpoint_folder

RECIPE = {
    "rank": 4,
    "max_steps": 7,
    "batch": 3,
    "accumulation": 3,
    "learning_rate": 0.02,
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
    return replace(whole, examples=whole.examples[:20])


@pytest.fixture(scope="module")
def alone(settings, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "adapter"
    train_tiny(corpus, settings, folder)
    return folder


def assert_alike(folder, alone):
    ours, expected = (load_file(place / "adapter_model.safetensors") for place in (folder, alone))
    assert ours.keys() == expected.keys()
    assert all(allclose(ours[name], expected[name], atol=5e-5) for name in expected)
    card, before = read_card(folder), read_card(alone)
    assert card.losses == pytest.approx(before.losses, abs=2e-4)
    assert card.first_loss == pytest.approx(before.first_loss, rel=1e-6)
    assert card.last_loss == pytest.approx(before.last_loss, rel=1e-4)
    assert (card.tokens, card.steps) == (before.tokens, before.steps)


def second_fails(rank, step):
    if (rank, step) == (1, 5):
        raise OSError("the second has enough")


def second_dies(rank, step):
    if (rank, step) == (1, 5):
        raise SystemExit


def test_two_give_the_adapter_of_one_and_one_takes_up_what_two_began(settings, corpus, alone, tmp_path):
    folder = tmp_path / "adapter"
    cards = trained_together([corpus, corpus], settings, folder)
    assert cards == [read_card(folder)] * 2
    assert_alike(folder, alone)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_failure_in_one_fails_all_and_they_go_on_from_one_checkpoint(settings, corpus, alone, tmp_path):
    folder = tmp_path / "adapter"
    outcomes = trained_together([corpus, corpus], settings, folder, second_fails)
    assert outcomes[0].startswith("TrainingError: another process of the group failed")
    assert outcomes[1] == "OSError: the second has enough"
    assert not folder.exists()
    (checkpoint_folder(folder) / "sentinel").touch()
    cards = trained_together([corpus, corpus], settings, folder)
    assert [card.resumed for card in cards] == [[4], [4]]
    assert_alike(folder, alone)


def test_one_that_dies_leaves_no_other_waiting_and_one_alone_goes_on(settings, corpus, alone, tmp_path):
    folder = tmp_path / "adapter"
    outcomes = trained_together([corpus, corpus], settings, folder, second_dies)
    assert outcomes[1] == "it died"
    assert outcomes[0] != "it hangs"
    assert train_tiny(corpus, settings, folder).resumed == [4]
    assert_alike(folder, alone)


def test_different_work_is_refused(settings, corpus, tmp_path):
    other = replace(corpus, examples=corpus.examples[1:])
    outcomes = trained_together([corpus, other], settings, tmp_path / "adapter")
    assert all("were given different work" in outcome for outcome in outcomes)
    assert list(tmp_path.iterdir()) == []


def test_with_dropout_every_process_draws_its_own_and_a_stopped_run_ends_the_same(settings, corpus, tmp_path):
    dropping = settings.model_copy(update={"training": settings.training.model_copy(update={"dropout": 0.3})})
    trained_together([corpus, corpus], dropping, tmp_path / "whole" / "adapter")
    stopped = tmp_path / "stopped" / "adapter"
    trained_together([corpus, corpus], dropping, stopped, second_fails)
    (card, _) = trained_together([corpus, corpus], dropping, stopped)
    assert card.resumed == [4]
    assert_alike(stopped, tmp_path / "whole" / "adapter")
