"""One adapter: the loss is on the answer, the base model comes back as it was, and what is saved is what was trained."""

import json
import math
import random
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_language_model import BOS, EOS, tiny_model, tiny_tokenizer, write_tiny_model

from lorafleet.config import load_settings
from lorafleet.errors import TrainingError
from lorafleet.prompts import encode_answer
from lorafleet.tasks import Example, load_catalogue, load_corpus
from lorafleet.training import adapter_name, choose_backend, is_current, read_card, train_adapter
from lorafleet.training.attention import without_masks
from lorafleet.training.loss import mean_answer_loss, summed_answer_loss
from lorafleet.training.rows import IGNORED, BatchShape, TokenRow, encode_examples, endless_batches, pad

CPU = torch.device("cpu")
RECIPE = {
    "rank": 4,
    "alpha": 8,
    "max_steps": 4,
    "accumulation": 2,
    "learning_rate": 0.02,
    "warmup_steps": 1,
    "max_tokens": 96,
    "backend": "peft",
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    base = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    return load_settings(models={"base": str(base), "device": "cpu"}, training=RECIPE)


@pytest.fixture(scope="module")
def corpus(settings):
    return load_corpus(load_catalogue(settings.tasks)["copa"], "train", settings.tasks)


def train(corpus, settings, folder, model=None, tokenizer=None):
    tokenizer = tokenizer or tiny_tokenizer()
    return train_adapter(model or tiny_model(), tokenizer, corpus, settings, "name", folder, lambda *_: None)


def test_a_tokenizer_without_tokens_for_end_and_padding_trains_the_same_adapter(corpus, settings, tmp_path):
    bare = tiny_tokenizer()
    bare.eos_token = bare.pad_token = None
    train(corpus, settings, tmp_path / "usual")
    train(corpus, settings, tmp_path / "bare", tokenizer=bare)
    usual, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("usual", "bare"))
    assert all(torch.equal(usual[name], other[name]) for name in usual)


def test_labels_stand_on_the_answer_and_its_end_alone():
    tokenizer = tiny_tokenizer()
    examples = [Example("t", "k", "Question?\nAnswer:", ("yes",)), Example("t", "k", "Q", ("a longer one",))]
    rows = encode_examples(tokenizer, EOS, examples, 96)
    exact = pad(rows, EOS)
    larger = BatchShape(3, exact.input_ids.shape[1] + 5, len(exact.columns) + 2)
    for batch in (exact, pad(rows, EOS, larger)):
        for ids, targets, answer in zip(batch.input_ids, batch.targets, (" yes", " a longer one"), strict=False):
            assert tokenizer.decode(targets[targets != IGNORED]) == answer + "</s>"
            assert torch.equal(ids[batch.columns + 1][targets != IGNORED], targets[targets != IGNORED])
            assert ids.tolist().count(BOS) == 1
        assert (batch.targets != IGNORED).sum() == sum(len(row.answer) for row in rows)
    assert exact.columns.tolist() == sorted(set(exact.columns.tolist()))
    assert (exact.targets != IGNORED).any(dim=0).all()


def test_a_long_row_loses_the_middle_of_its_prompt_and_none_of_its_answer():
    prompt = "HEAD" + "x" * 500 + "TAIL"
    (row,) = encode_examples(tiny_tokenizer(), EOS, [Example("t", "k", prompt, ("the answer",))], 40)
    assert row.cut
    assert len(row) == 40
    text = tiny_tokenizer().decode([*row.prompt, *row.answer])
    assert text.startswith("<s>HEAD")
    assert text.endswith("TAIL the answer</s>")


@pytest.mark.parametrize("prompt", ["ดาวพุธอยู่ใกล้ดวงอาทิตย์ที่สุด\nAnswer:", "水星离太阳最近\nAnswer:"])
def test_a_prompt_of_more_tokens_than_characters_is_cut_by_max_tokens_alone(prompt):
    tokenizer, bytes_of = tiny_tokenizer(), len(prompt.encode())
    assert bytes_of > len(prompt) + 1
    whole = len(encode_answer(tokenizer, "yes")) + len([BOS, EOS]) + bytes_of
    (row,) = encode_examples(tokenizer, EOS, [Example("t", "k", prompt, ("yes",))], whole)
    assert not row.cut
    assert tokenizer.decode(row.prompt) == f"<s>{prompt}"
    (row,) = encode_examples(tokenizer, EOS, [Example("t", "k", prompt, ("yes",))], whole - 1)
    assert row.cut
    assert len(row) == whole - 1


def test_padding_and_few_logits_do_not_change_the_loss():
    model = tiny_model()
    examples = [Example("t", "k", "a" * length, ("b" * (length % 7 + 1),)) for length in (3, 40, 17)]
    rows = encode_examples(tiny_tokenizer(), EOS, examples, 96)
    alone = 0.0
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.answer]])
        labels = torch.tensor([[IGNORED] * len(row.prompt) + list(row.answer)])
        alone += float(model(input_ids=ids, labels=labels).loss) * len(row.answer)
    batch = pad(rows, EOS)
    assert float(summed_answer_loss(model, batch)) == pytest.approx(alone, rel=1e-5)
    larger = pad(rows, EOS, BatchShape(4, 64, len(batch.columns) + 3))
    with without_masks(model, 64):
        assert float(summed_answer_loss(model, larger)) == pytest.approx(alone, rel=1e-5)


def test_the_base_model_comes_back_untouched_and_trains_the_next_adapter_alike(settings, corpus, tmp_path):
    model = tiny_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    checkpointed = settings.model_copy(
        update={"training": settings.training.model_copy(update={"gradient_checkpointing": True})}
    )
    train(corpus, checkpointed, tmp_path / "first", model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(weight.requires_grad for weight in model.parameters())
    train(corpus, settings, tmp_path / "second", model)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(settings, corpus, tmp_path):
    other = settings.model_copy(update={"training": settings.training.model_copy(update={"seed": 1})})
    for name, chosen in (("one", settings), ("two", settings), ("other", other)):
        train(corpus, chosen, tmp_path / name)
        torch.rand(3)
    files = ("adapter_model.safetensors", "adapter_config.json")
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    assert (tmp_path / "one" / files[0]).read_bytes() != (tmp_path / "other" / files[0]).read_bytes()


def test_peft_loads_the_adapter_and_finds_the_loss_of_its_card(settings, corpus, tmp_path):
    few = replace(corpus, examples=corpus.examples[:8])  # All of them are in the loss sample.
    card = train(few, settings, tmp_path / "adapter")
    assert card.last_loss < card.first_loss
    rows = encode_examples(tiny_tokenizer(), EOS, few.examples, settings.training.max_tokens)
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter"))
    assert mean_answer_loss(loaded, rows, EOS, CPU, 4) == pytest.approx(card.last_loss, rel=1e-5)
    assert mean_answer_loss(tiny_model(), rows, EOS, CPU, 4) == pytest.approx(card.first_loss, rel=1e-5)


def test_layers_in_bfloat16_learn_as_in_float32_and_the_adapter_is_saved_in_float32(settings, corpus, tmp_path):
    few = replace(corpus, examples=corpus.examples[:8])
    expected = train(few, settings, tmp_path / "float32")
    card = train(few, settings, tmp_path / "bfloat16", tiny_model().to(torch.bfloat16))
    assert card.losses == pytest.approx(expected.losses, rel=0.01)
    assert expected.first_loss - card.last_loss == pytest.approx(expected.first_loss - expected.last_loss, rel=0.1)
    weights = load_file(tmp_path / "bfloat16" / "adapter_model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    # Steps smaller than bfloat16 can tell apart are not lost.
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights.values())


def test_a_card_is_current_until_rows_or_recipe_change(settings, corpus, tmp_path):
    train(corpus, settings, tmp_path / "adapter")
    card = read_card(tmp_path / "adapter")
    assert is_current(card, corpus, settings)
    assert not is_current(card, replace(corpus, examples=corpus.examples[1:]), settings)

    def changed(**training):
        return settings.model_copy(update={"training": settings.training.model_copy(update=training)})

    older = {key: value for key, value in card.training.items() if key not in ("quantization", "tracking")}
    assert is_current(replace(card, training=older), corpus, settings)
    assert is_current(card, corpus, changed(workers=7, workers_per_adapter=2, cuda_graphs=False, tracking="wandb"))
    assert not is_current(card, corpus, changed(quantization="4bit"))
    assert not is_current(card, corpus, changed(learning_rate=0.5))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    assert read_card(tmp_path / "adapter") is None
    assert adapter_name(settings, "copa").endswith("-copa-4")


def test_a_loss_that_is_no_number_leaves_no_adapter_and_a_clean_base(settings, corpus, tmp_path):
    model = tiny_model()
    model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(TrainingError, match=r"training\.learning_rate"):
        train(corpus, settings, tmp_path / "adapter", model)
    assert list(tmp_path.iterdir()) == []
    assert not any("lora" in name for name, _ in model.named_modules())


def test_a_gradient_that_is_no_number_is_refused_with_its_step(settings, corpus, tmp_path):
    steep = settings.model_copy(update={"training": settings.training.model_copy(update={"learning_rate": 1e30})})
    with pytest.raises(TrainingError, match=r"no longer a number at step [234].*training\.learning_rate = 1e\+30"):
        train(corpus, steep, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_card_tells_every_loss_and_one_without_them_is_still_read(settings, corpus, tmp_path):
    card = train(corpus, settings, tmp_path / "adapter")
    assert read_card(tmp_path / "adapter") == card
    assert len(card.losses) == card.steps
    assert card.losses[-1] < card.losses[0]
    assert card.resumed == []
    file = tmp_path / "adapter" / "card.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in data.items() if key not in ("losses", "resumed")}))
    assert is_current(read_card(tmp_path / "adapter"), corpus, settings)
    file.write_text(json.dumps(data | {"unknown": 1}))
    assert read_card(tmp_path / "adapter") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="unsloth may work here")
def test_unsloth_without_cuda_is_refused_when_asked_for_and_passed_over_when_not(settings):
    def backend(name):
        return choose_backend(
            settings.model_copy(update={"training": settings.training.model_copy(update={"backend": name})})
        )

    with pytest.raises(TrainingError, match="unsloth needs CUDA"):
        backend("unsloth")
    assert (backend("auto").name, backend("auto").reason) == ("peft", "unsloth needs CUDA")


def test_a_base_in_4_bits_is_refused_on_a_cpu(settings):
    for name in ("auto", "peft"):
        update = {"quantization": "4bit", "backend": name}
        with pytest.raises(TrainingError, match=r"training\.quantization is 4bit, which needs CUDA"):
            choose_backend(settings.model_copy(update={"training": settings.training.model_copy(update=update)}))


@pytest.mark.parametrize("size", [1, 3, 4])
def test_an_epoch_holds_every_row_once_and_rows_of_like_length_stand_together(size):
    draws = random.Random(0)
    rows = [TokenRow((1,) * draws.randint(8, 90), (2, 3), cut=False) for _ in range(41)]
    batches = math.ceil(len(rows) / size)
    endless = endless_batches(rows, size, seed=5)
    epochs = [list(islice(endless, batches)) for _ in range(2)]
    assert epochs[0] != epochs[1]
    again = endless_batches(rows, size, seed=5)
    assert [list(islice(again, batches)) for _ in range(2)] == epochs
    for epoch in epochs:
        assert Counter(id(row) for batch in epoch for row in batch) == Counter(id(row) for row in rows)
        padding = sum(max(map(len, batch)) * len(batch) - sum(map(len, batch)) for batch in epoch)
        assert padding < 0.1 * sum(map(len, rows))


@pytest.mark.integration
def test_the_packaged_model_learns(tmp_path):
    settings = load_settings(
        training={**RECIPE, "max_steps": 3, "accumulation": 1, "learning_rate": 1e-3}, models={"device": "cpu"}
    )
    corpus = load_corpus(load_catalogue(settings.tasks)["wnli"], "train", settings.tasks)
    model, tokenizer = choose_backend(settings).load(settings)
    few = replace(corpus, examples=corpus.examples[:8])
    card = train_adapter(model, tokenizer, few, settings, "name", tmp_path / "adapter", lambda *_: None)
    assert card.last_loss < card.first_loss
