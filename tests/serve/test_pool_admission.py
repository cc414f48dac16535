"""What the pool refuses, and what it makes of a change that another pool has left half done: nothing stays behind."""

import asyncio
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from small_fleet import fill, footprint, free_port, save_adapter, small_settings
from transformers import LlamaConfig, LlamaForCausalLM

from lorafleet.adapters import stored_adapters
from lorafleet.config import Settings
from lorafleet.errors import IndexUnavailable
from lorafleet.retrieval import Entry, open_for_writing, row_identifiers, server
from lorafleet.storage import write_json
from lorafleet.tasks import prompt_version
from lorafleet.training.cards import AdapterCard
from serve.errors import ApiError
from serve.follower import Kind, Published, Standing
from serve.pool import Pool
from serve.protocol.requests import AdapterRequest

pytestmark = pytest.mark.integration

SEAS = ["How deep is the ocean?", "Whales sing in the sea."]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a Chroma server."""
    settings = small_settings(tmp_path_factory.mktemp("index"), free_port())
    server.start(settings)
    yield int(settings.index.url.rpartition(":")[2])
    server.stop(settings)


@pytest.fixture
def settings(index: int, tmp_path: Path) -> Settings:
    settings = small_settings(tmp_path, index, adapter_rank=16, adapter_mib=1, adapter_rows=5)
    fill(settings)
    return settings


@pytest.fixture
def with_pool(settings: Settings, monkeypatch: pytest.MonkeyPatch):
    """Do something with a pool that nobody follows, in an event loop, and give its footprint when it is settled."""
    monkeypatch.setattr("serve.standings.LOST_SECONDS", 0.1)

    def run(what=None):
        async def running():
            pool = object.__new__(Pool.func_or_class)
            await pool.__init__(settings)
            try:
                return await what(pool) if what else None
            finally:
                while pool._change is not None:
                    await asyncio.sleep(0.02)
                os.close(pool._journal._lock)

        return asyncio.run(running())

    return run


@pytest.fixture
def refused(with_pool, settings: Settings):
    """The error that an adapter is refused with, once it is sure that the refusal has left nothing behind."""

    def refused(**wishes) -> ApiError:
        before = footprint(settings)
        request = AdapterRequest.model_construct(**{"task": None, "rows": None, "corpus": None, "name": "seas"} | wishes)
        with pytest.raises(ApiError) as caught:
            with_pool(lambda pool: pool.add(request))
        assert footprint(settings) == before
        assert "\n" not in caught.value.message
        return caught.value

    return refused


@pytest.fixture
def source(settings: Settings) -> Path:
    return save_adapter(settings.adapter_roots[0] / "seas", seed=7)


def test_one_that_is_in_order_is_taken_and_another_pool_knows_it(with_pool, settings, source):
    before = footprint(settings)
    corpus = source.parent / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": SEAS}), corpus)
    with_pool(
        lambda pool: pool.add(
            AdapterRequest(name="seas-4", task="seas", source=source.as_uri(), corpus=str(corpus)),
        )
    )
    assert open_for_writing(settings, prompt_version()).counts() == {"cooking": 3, "seas": 2, "weather": 3}
    assert stored_adapters(settings).adapters["seas"].name == "seas-4"
    assert sorted(path.name for path in (settings.adapters / "seas-4").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "added.json",
    ]
    with_pool(lambda pool: pool.remove("seas"))
    assert footprint(settings) == before


@pytest.mark.parametrize(
    ("fields", "status", "param", "says"),
    [
        ({"name": "weather"}, 409, "name", "taken"),
        ({"task": "weather"}, 409, "task", "taken"),
        ({"name": "../seas"}, 400, "name", "Allowed"),
        ({"name": ".seas"}, 400, "name", "Allowed"),
        ({"name": "Auto"}, 400, "name", "meaning"),
        ({"source": "/etc"}, 400, "source", "adapter_roots"),
        ({"source": "{root}"}, 400, "source", "adapter_roots"),
        ({"source": "{root}/../adapters/weather"}, 400, "source", "adapter_roots"),
        ({"source": "{root}/nowhere"}, 400, "source", "adapter_roots"),
        ({"source": "seas"}, 400, "source", "absolute"),
        ({"source": "s3://bucket/seas"}, 400, "source", "file://"),
        ({"source": "file://elsewhere{root}/seas"}, 400, "source", "file://"),
        ({"source": "{root}/seas\0"}, 400, "source", "nothing is there"),
        ({"source": "file://{root}/seas%00"}, 400, "source", "nothing is there"),
        ({"source": "http://[seas"}, 400, "source", "file://"),
        ({"source": "{root}/seas/adapter_config.json"}, 400, "source", "not a folder"),
        ({"rows": [""]}, 400, "rows.0", "empty"),
        ({"rows": ["a", {"txt": "a"}]}, 400, "rows.1", "text"),
        ({"task": "copa", "rows": [{"premise": "a"}]}, 400, "rows.0", "missing"),
        (
            {"task": "squad", "rows": [{"context": "a", "question": "b", "answers": {"text": {"a": 5}}}]},
            400,
            "rows.0",
            "neither an answer",
        ),
        ({"rows": ["\ud800"]}, 400, "rows.0", "surrogate"),
        ({"rows": ["a"] * 6}, 400, "rows", "more than 5"),
        ({"corpus": "{root}/rows.jsonl"}, 400, "corpus", "nothing is there"),
        ({"corpus": "/etc/passwd"}, 400, "corpus", "nothing is there"),
        ({"task": "gardening", "rows": ["a"]}, 409, "task", "rows in the index"),
    ],
)
def test_a_request_that_is_wrong_is_refused_by_its_field(refused, settings, source, fields, status, param, says):
    root = settings.adapter_roots[0]
    index = open_for_writing(settings, prompt_version())
    index.write([Entry(row_identifiers("gardening", ["a"])[0], "gardening", "a")], np.full((1, 384), 384**-0.5, np.float32))
    placed = {key: value.format(root=root) if isinstance(value, str) else value for key, value in fields.items()}
    error = refused(**{"source": str(source)} | placed)
    assert (error.status, error.param) == (status, param)
    assert says in error.message


def another_base() -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=259, num_hidden_layers=2, **sizes))


def with_pickle(folder: Path) -> Path:
    (folder / "checkpoint").mkdir()
    torch.save({}, folder / "checkpoint" / "optimizer.pt")
    return folder


def as_pickle(folder: Path) -> Path:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    return folder


def linked_away(folder: Path) -> Path:
    weights, outside = folder / "adapter_model.safetensors", folder.parents[2] / "outside.safetensors"
    weights.rename(outside)
    weights.symlink_to(outside)
    return folder


def itself_a_link(folder: Path) -> Path:
    outside = folder.parents[2] / "outside"
    folder.rename(outside)
    folder.symlink_to(outside)
    return folder


def with_a_pipe(folder: Path) -> Path:
    (folder / "card.json").unlink(missing_ok=True)
    os.mkfifo(folder / "card.json")
    return folder


def archived(folder: Path) -> Path:
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        archive.write(folder / "adapter_config.json")
    return folder.with_suffix(".zip")


def with_archive(folder: Path) -> Path:
    archived(folder).rename(folder / "more.zip")
    return folder


def too_large(folder: Path) -> Path:
    with (folder / "adapter_model.safetensors").open("ab") as file:
        file.write(bytes(2**20))
    return folder


def cut(folder: Path) -> Path:
    os.truncate(folder / "adapter_model.safetensors", 3000)
    return folder


def dora(folder: Path) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    return folder


def of_another_fleet(folder: Path) -> Path:
    names = [field.name for field in fields(AdapterCard)]
    numbers = dict.fromkeys(["rows", "cut_rows", "steps", "first_loss", "last_loss", "seconds", "tokens"], 1)
    rest = {"training": {}, "versions": {}, "losses": [], "resumed": [], "base": "some/base", "base_fingerprint": "other"}
    write_json(folder / "card.json", dict.fromkeys(names, "") | numbers | rest)
    return folder


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (with_pickle, "checkpoint/optimizer.pt, which can carry code"),
        (as_pickle, "adapter_model.bin, which can carry code"),
        (linked_away, "adapter_model.safetensors, a link to somewhere else"),
        (itself_a_link, "nothing is there below"),
        (with_a_pipe, "card.json, which is neither file nor folder"),
        (archived, "seas.zip, not a folder. Unpack it"),
        (with_archive, "the archive more.zip"),
        (too_large, "more than 1048576 bytes|more than 104[0-9]+ bytes"),
        (cut, "cannot read"),
        (dora, "DoRA"),
        (of_another_fleet, "some/base other, and the fleet's"),
        (lambda folder: save_adapter(folder, rank=17), "rank 17. Allowed: at most 16"),
        (lambda folder: save_adapter(folder, model=another_base(), base="some/other"), "the base model has.*'some/other'"),
    ],
)
def test_a_folder_that_is_wrong_is_refused(refused, source, spoil, says):
    error = refused(source=str(spoil(source)), rows=SEAS)
    assert (error.status, error.param) == (400, "source")
    assert re.search(says, error.message), error.message


class Replica:
    """Follows a pool by hand: takes its time, or fails with a text, or (an empty one) never gets there."""

    def __init__(self, pool, kind: Kind, who: str, seconds: float = 0.0, failed: str | None = None) -> None:
        self.pool, self.standing, self.seconds, self.failed = pool, Standing(who, kind), seconds, failed
        self.published, self.over = Published(), False

    def has(self, task: str) -> bool:
        roster = self.published.loaded if self.standing.kind == "generator" else self.published.shown
        return task in roster.adapters

    async def follow(self) -> None:
        while not self.over:
            published = await self.pool.follow(self.standing)
            if self.failed is not None and "seas" in published.loaded.adapters:
                self.standing = replace(self.standing, seen=published.version, failed=self.failed or None)
                continue
            self.standing = replace(self.standing, seen=published.version, failed=None)
            await asyncio.sleep(self.seconds)
            self.published = published
            self.standing = replace(self.standing, has=published.version, drained=published.version)


@pytest.fixture
def followed(with_pool, monkeypatch):
    """Do something with a pool that replicas follow."""
    monkeypatch.setattr("serve.pool.POLL_SECONDS", 0.05)
    monkeypatch.setattr("serve.standings.LOST_SECONDS", 1)

    def run(what, **replicas):
        async def running(live):
            following = {who: Replica(live, who.split("_")[0], who, **given) for who, given in replicas.items()}
            tasks = [asyncio.create_task(replica.follow()) for replica in following.values()]
            # By then the pool knows who lives.
            await asyncio.sleep(0.3)
            try:
                return await what(live, following)
            finally:
                for replica in following.values():
                    replica.over = True
                await asyncio.gather(*tasks)

        return with_pool(running)

    return run


def test_an_adapter_is_shown_when_every_generator_has_it_and_hidden_before_one_drops_it(followed, source):
    async def comes_and_goes(live, replicas):
        generators = [replicas["generator_1"], replicas["generator_2"]]
        seen = []

        async def watch() -> None:
            while True:
                seen.append((replicas["gateway"].has("seas"), all(generator.has("seas") for generator in generators)))
                await asyncio.sleep(0.005)

        watching = asyncio.create_task(watch())
        added = await live.add(AdapterRequest(name="seas", source=str(source)))
        assert all(replica.has("seas") for replica in replicas.values())
        await live.remove(added.name)
        assert not any(replica.has("seas") for replica in replicas.values())
        watching.cancel()
        return set(seen)

    seen = followed(comes_and_goes, generator_1={"seconds": 0.3}, generator_2={}, gateway={"seconds": 0.2})
    assert seen == {(False, False), (False, True), (True, True)}


def test_what_one_generator_cannot_load_is_in_none(followed, settings, source):
    before = footprint(settings)

    async def add(live, replicas):
        with pytest.raises(ApiError, match="source cannot be loaded: no room") as caught:
            await live.add(AdapterRequest(name="seas", source=str(source), rows=SEAS))
        await asyncio.sleep(0.2)
        assert not any(replica.has("seas") for replica in replicas.values())
        return caught.value.status

    assert followed(add, generator_1={}, generator_2={"failed": "no room"}, gateway={}) == 400
    assert footprint(settings) == before


def test_a_generator_that_does_not_follow_in_time_makes_an_add_fail(followed, settings, source):
    before = footprint(settings)

    async def add(live, replicas):
        live._settings = settings.model_copy(
            update={"serving": settings.serving.model_copy(update={"adapter_seconds": 0.2})}
        )
        with pytest.raises(ApiError, match="a generator has not followed") as caught:
            await live.add(AdapterRequest(name="seas", source=str(source)))
        return caught.value.status

    assert followed(add, generator_1={"failed": ""}, generator_2={}) == 503
    assert footprint(settings) == before


def test_two_changes_at_once_are_one_and_a_409(with_pool, source):
    async def both(pool):
        request = AdapterRequest(name="seas", source=str(source))
        return await asyncio.gather(pool.add(request), pool.remove("weather"), return_exceptions=True)

    added, busy = with_pool(both)
    assert added.name == "seas"
    assert (busy.status, busy.code) == (409, "change_under_way") and busy.retry_after


@pytest.mark.parametrize("step", ["begun", "copied", "indexed"])
def test_an_add_that_was_left_half_done_is_undone(with_pool, settings, source, step):
    before = footprint(settings)
    change = {"action": "add", "name": "seas", "task": "seas", "rows": True}
    write_json(settings.adapters / ".change.json", change)
    if step != "begun":
        shutil.copytree(source, settings.adapters / ".incoming-seas")
    if step == "indexed":
        write_rows(settings, "seas")
    with_pool()
    assert footprint(settings) == before


def test_an_add_that_was_as_good_as_done_stays(with_pool, settings, source):
    write_rows(settings, "seas")
    shutil.copytree(source, settings.adapters / "seas")
    expected = footprint(settings)
    change = {"action": "add", "name": "seas", "task": "seas", "rows": True}
    write_json(settings.adapters / ".change.json", change)
    with_pool()
    assert footprint(settings) == expected


@pytest.mark.parametrize("step", ["begun", "dropped"])
def test_a_removal_that_was_left_half_done_is_finished(with_pool, settings, step):
    change = {"action": "remove", "name": "weather", "task": "weather", "rows": True}
    write_json(settings.adapters / ".change.json", change)
    if step == "dropped":
        (settings.adapters / "weather").rename(settings.adapters / ".leaving-weather")
    with_pool()
    left = footprint(settings)
    assert set(left["rows"]) == {"cooking"}
    assert {path.split("/")[1] for path in left["files"]} == {"cooking"}


def test_while_the_index_is_away_an_add_with_rows_is_refused_and_one_without_is_not(with_pool, settings, source):
    away = settings.model_copy(update={"index": settings.index.model_copy(update={"url": "http://127.0.0.1:9"})})

    async def add(pool):
        pool._settings = away
        with pytest.raises(IndexUnavailable):
            await pool.add(AdapterRequest(name="seas", source=str(source), rows=SEAS))
        return await pool.add(AdapterRequest(name="seas", source=str(source)))

    assert with_pool(add).rows == 0


def write_rows(settings: Settings, task: str) -> None:
    entries = [Entry(name, task, text) for name, text in zip(row_identifiers(task, SEAS), SEAS, strict=True)]
    open_for_writing(settings, prompt_version()).write(entries, np.full((len(SEAS), 384), 384**-0.5, np.float32))
