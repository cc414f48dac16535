"""Odd adapters in storage: they are listed, left out or refused, and those beside them are served."""

import asyncio
import json
import logging
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_fleet import save_adapter, small_settings
from starlette.responses import JSONResponse

from lorafleet.adapters import Roster, stored_adapter, stored_adapters
from lorafleet.composition import Composition
from lorafleet.config import Settings
from lorafleet.engine import GenerationRequest
from lorafleet.errors import AdapterError
from lorafleet.evaluation.arrow import ArrowModel
from lorafleet.fleet import load_engine
from lorafleet.models import fingerprint
from lorafleet.training.cards import AdapterCard, read_card
from serve.follower import Published, Standing
from serve.generator import Generator, generate, within_reach
from serve.listing import listed
from serve.standings import Standings

CARD = {
    "name": "odd",
    "task": "odd",
    "family": "odds",
    "corpus": "c",
    "source": "s",
    "rows": 3,
    "cut_rows": 0,
    "training": {"rank": 4},
    "base": "b",
    "base_fingerprint": "f",
    "backend": "peft",
    "steps": 1,
    "first_loss": 2,
    "last_loss": 1.5,
    "seconds": 1.0,
    "tokens": 9,
    "versions": {},
    "date": "2026-01-01T00:00:00+00:00",
}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = small_settings(tmp_path, 1)
    save_adapter(settings.adapters / "good", seed=1)
    return settings


def shown(folder: Path) -> bytes:
    """The list of a pool that has this adapter, as the endpoint sends it."""
    adapter = stored_adapter(folder)
    roster = Roster([adapter])
    return bytes(JSONResponse(listed(Published(1, roster, roster), {}).model_dump()).body)


def test_every_field_of_a_card_is_tried():
    assert {field.name for field in fields(AdapterCard)} == CARD.keys() | {"losses", "resumed"}


@pytest.mark.parametrize(
    "changed",
    [
        {"task": ["odd"]},
        {"family": 5},
        {"rows": True},
        {"rows": "many"},
        {"first_loss": float("nan")},
        {"training": {"rank": float("inf")}},
        {"losses": "none"},
        {"more": 1},
    ],
    ids=str,
)
def test_a_card_with_odd_values_is_none_and_the_adapter_is_listed_without(settings, changed):
    folder = settings.adapters / "good"
    (folder / "card.json").write_text(json.dumps(CARD))
    assert read_card(folder) == AdapterCard(**CARD)
    assert json.loads(shown(folder))["data"][0]["card"]["task"] == "odd"
    (folder / "card.json").write_text(json.dumps(CARD | changed))
    assert read_card(folder) is None
    assert json.loads(shown(folder))["data"][0]["card"] is None


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"[" * 100_000, id="nested"),
        pytest.param(json.dumps(CARD).encode("utf-16"), id="utf-16"),
        pytest.param(b'{"name": "\\ud800"}', id="half a surrogate pair"),
        pytest.param(b"9" * 5000, id="a number of 5,000 digits"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"\xff", id="no text"),
    ],
)
def test_a_card_that_is_no_json_is_none(settings, text):
    (settings.adapters / "good" / "card.json").write_bytes(text)
    assert read_card(settings.adapters / "good") is None
    assert shown(settings.adapters / "good")


@pytest.mark.parametrize("date", ["yesterday", "0001-01-01T00:00:00+00:00", "0001-01-01", ""])
def test_a_card_with_an_odd_date_is_listed(settings, date):
    (settings.adapters / "good" / "card.json").write_text(json.dumps(CARD | {"date": date}))
    assert json.loads(shown(settings.adapters / "good"))["data"][0]["card"]["date"] == date


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter_config.json", b"[]"),
        ("adapter_config.json", b"[" * 5000),
        ("adapter_config.json", b'{"peft_type": "LORA", "lora_alpha": 1' + b"0" * 400 + b"}"),
        ("adapter_config.json", b'{"peft_type": "LORA", "lora_alpha": NaN}'),
        ("adapter_model.safetensors", b""),
    ],
    ids=["list", "nested", "alpha of 401 digits", "alpha NaN", "no weights"],
)
def test_an_adapter_that_cannot_be_read_is_listed_without_its_shape(settings, file, content):
    (settings.adapters / "good" / file).write_bytes(content)
    (adapter,) = json.loads(shown(settings.adapters / "good"))["data"]
    assert (adapter["name"], adapter["rank"], adapter["alpha"]) == ("good", 0, 0.0)


def test_a_folder_that_goes_while_the_adapters_are_read_is_none(settings, monkeypatch):
    """The card of one is read while another, and itself, is removed."""
    save_adapter(settings.adapters / "other", seed=2)
    base = fingerprint(settings.models.base)
    for name in ("good", "other"):
        card = CARD | {"name": name, "task": name, "base_fingerprint": base}
        (settings.adapters / name / "card.json").write_text(json.dumps(card))
    glob = Path.glob

    def glob_then_remove(path: Path, pattern: str):
        found = list(glob(path, pattern))
        shutil.rmtree(settings.adapters / "good")
        return found

    monkeypatch.setattr(Path, "glob", glob_then_remove)
    assert set(stored_adapters(settings).adapters) == {"other"}


def hot(folder: Path) -> Path:
    """An adapter with weights that no number format of the engine holds."""
    save_adapter(folder, seed=3)
    path = folder / "adapter_model.safetensors"
    save_file({key: torch.full(value.shape, 1e300, dtype=torch.float64) for key, value in load_file(path).items()}, path)
    return folder


def cut(folder: Path) -> Path:
    save_adapter(folder, seed=3)
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    return folder


@pytest.fixture
def generator(settings):
    """A generator's own state around a real engine, which nobody follows."""
    made = []

    def make() -> Generator:
        generator = object.__new__(Generator.func_or_class)
        generator._roster = stored_adapters(settings)
        generator._left_out = {}
        generator._engine = load_engine(settings, generator._roster, leave_out=generator._leave_out)
        made.append(generator._engine)
        return generator

    yield make
    for engine in made:
        engine.close()


def text(engine, name: str) -> str:
    (answer,) = asyncio.run(generate(engine, [GenerationRequest("one", Composition(weights={name: 1}), max_tokens=4)]))
    return answer.text


def test_adapters_that_cannot_be_loaded_do_not_stop_the_others(settings, generator):
    hot(settings.adapters / "hot")
    cut(settings.adapters / "cut")
    with pytest.raises(AdapterError):
        load_engine(settings, stored_adapters(settings))
    live = generator()
    engine = live._engine
    assert set(engine.pool) == {"good"}
    assert {task: reason.split()[1] for task, reason in live._left_out.items()} == {"cut": "cut:", "hot": "hot:"}
    assert text(engine, "good") is not None
    assert within_reach({"hot": 0.5, "good": 0.5}, engine.pool) == {"good": 1.0}


def test_one_that_comes_in_is_refused_and_one_of_the_pool_is_left_out(settings, generator, caplog):
    live = generator()
    before = live._roster
    coming = before.having(stored_adapter(hot(settings.adapters / "hot")))
    with pytest.raises(AdapterError, match=r"adapter hot: .* float32 ends at"):
        asyncio.run(live._take_adapters(Published(2, coming, before)))
    assert "hot" not in live._engine.pool
    with caplog.at_level(logging.ERROR, "ray.serve"):
        asyncio.run(live._take_adapters(Published(3, coming, coming)))
    assert "an adapter is left out: adapter hot" in caplog.text
    assert set(live._engine.pool) == {"good"}
    assert "float32 ends at" in live._left_out["hot"]
    asyncio.run(live._take_adapters(Published(4, before, before)))
    assert not live._left_out


def test_weights_of_before_do_not_answer_for_those_that_cannot_be_loaded(settings, generator):
    live = generator()
    cut(settings.adapters / "good")
    changed = stored_adapters(settings)
    asyncio.run(live._take_adapters(Published(2, changed, changed)))
    assert "good" not in live._engine.pool and set(live._left_out) == {"good"}
    save_adapter(settings.adapters / "good", seed=1)
    restored = stored_adapters(settings)
    asyncio.run(live._take_adapters(Published(3, restored, restored)))
    assert "good" in live._engine.pool and not live._left_out


def test_an_adapter_that_a_generator_leaves_out_is_listed_as_failed_with_the_reason(settings, generator):
    cut(settings.adapters / "cut")
    live = generator()
    standings = Standings()
    standings.note(Standing("one", "generator", 1, 1, left_out=dict(live._left_out)))
    standings.note(Standing("two", "gateway", 1, 1))
    published = Published(1, live._roster, live._roster)
    cut_one, good = listed(published, standings.left_out).data
    assert (cut_one.name, cut_one.state, good.state, good.error) == ("cut", "failed", "ready", None)
    assert cut_one.error is not None and cut_one.error.startswith("adapter cut: cannot read")


@pytest.mark.parametrize(
    "changed", [{"target_modules": "(.+)+!"}, {"rank_pattern": {"q.*": 4}}, {"alpha_pattern": {"q.*": 4}}]
)
def test_patterns_that_peft_would_run_are_refused_by_arrow(settings, changed):
    path = settings.adapters / "good" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(AdapterError, match="arrow takes no patterns, adapter good has some"):
        ArrowModel(settings, [stored_adapter(path.parent)])
