"""On a GPU: the same adapter by CUDA graphs and without, and on a base model in 4 bits."""

import importlib.util
import logging
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_language_model import EOS, tiny_tokenizer, write_tiny_model

from lorafleet.config import load_settings
from lorafleet.tasks import load_catalogue, load_corpus
from lorafleet.training import choose_backend, train_adapter
from lorafleet.training.loss import mean_answer_loss
from lorafleet.training.rows import encode_examples

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

RECIPE = {
    "rank": 4,
    "max_steps": 30,
    "batch": 4,
    "accumulation": 2,
    "learning_rate": 0.01,
    "max_tokens": 96,
    "backend": "peft",
    "dtype": "float32",
    "checkpoint_steps": 7,
}


@pytest.fixture
def settings(tmp_path):
    base = write_tiny_model(tmp_path / "tiny")
    return load_settings(models={"base": str(base), "device": "cuda"}, training=RECIPE)


@pytest.fixture
def corpus(settings):
    return load_corpus(load_catalogue(settings.tasks)["copa"], "train", settings.tasks)


def train(corpus, settings, folder, **training):
    chosen = settings.model_copy(update={"training": settings.training.model_copy(update=training)})
    model, tokenizer = choose_backend(chosen).load(chosen)
    told = []
    card = train_adapter(model, tokenizer, corpus, chosen, "name", folder, lambda step, loss: told.append((step, loss)))
    assert [step for step, _ in told] == list(range(1, RECIPE["max_steps"] + 1))
    assert [loss for _, loss in told] == pytest.approx(card.losses, abs=1e-4)
    return card


def test_graphs_replay_what_is_computed_without_them(settings, corpus, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        card = train(corpus, settings, tmp_path / "graphs")
    assert "no CUDA graphs" not in caplog.text
    without = train(corpus, settings, tmp_path / "without", cuda_graphs=False)
    assert card.losses == pytest.approx(without.losses, abs=2e-3)
    assert card.last_loss == pytest.approx(without.last_loss, rel=1e-3)
    ours, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("graphs", "without"))
    assert all((ours[name] - expected[name]).norm() < 0.02 * expected[name].norm() for name in expected)


def test_in_bfloat16_the_saved_adapter_has_the_loss_of_its_card_and_float32_weights(settings, corpus, tmp_path):
    few = replace(corpus, examples=corpus.examples[:8])
    card = train(few, settings, tmp_path / "adapter", dtype="bfloat16")
    assert card.last_loss < card.first_loss
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    bare = settings.model_copy(update={"training": settings.training.model_copy(update={"dtype": "float32"})})
    model, _ = choose_backend(bare).load(bare)
    loaded = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    rows = encode_examples(tiny_tokenizer(), EOS, few.examples, settings.training.max_tokens)
    assert mean_answer_loss(loaded, rows, EOS, torch.device("cuda"), 4) == pytest.approx(card.last_loss, rel=0.02)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_on_4_bits_an_adapter_learns_and_is_saved_as_any_other(settings, corpus, tmp_path):
    card = train(corpus, settings, tmp_path / "adapter", quantization="4bit", dtype="bfloat16")
    assert card.last_loss < card.first_loss
    assert card.training["quantization"] == "4bit"
    plain = train(corpus, settings, tmp_path / "plain")
    assert plain.training["quantization"] == "none"
    shapes = [
        {name: weight.shape for name, weight in load_file(tmp_path / folder / "adapter_model.safetensors").items()}
        for folder in ("adapter", "plain")
    ]
    assert shapes[0] == shapes[1]
