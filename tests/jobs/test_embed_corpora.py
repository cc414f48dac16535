"""Indexing on a real cluster with a real Chroma server, undisturbed and disturbed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import jobs.embed_corpora
from jobs.embed_corpora import embed_corpora, print_report
from jobs.encoding import embedded
from jobs.parcels import Reading
from lorafleet.config import Settings, load_settings
from lorafleet.errors import IndexMismatch, IndexUnavailable, LoRAFleetError, TaskError
from lorafleet.placing import places_of
from lorafleet.retrieval import (
    Encoder,
    Entry,
    NextVersion,
    Version,
    indexing,
    open_for_writing,
    open_index,
    read_manifest,
    row_identifiers,
    server,
)
from lorafleet.storage import read_json
from lorafleet.tasks import prompt_version

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("cluster")]

DECLARATION = """
colours:
  family: test
  files: {train: colours.jsonl}
  instruction: Name the colour.
  text: "Thing: {thing}"
  options: [red, green]
  label: label
"""
KEY = "Name the colour.\nThing: {}"
DIMENSIONS = 384
PATIENCE_SECONDS = 300


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Callable[..., Settings]]:
    """Settings with a state folder and a port of their own; a server that is started there is ended."""
    (tmp_path / "tasks.yaml").write_text(DECLARATION)
    made: dict[str, Settings] = {}

    def make(state: str = "state", encoders: int | None = None, **tasks) -> Settings:
        url = f"http://127.0.0.1:{free_port()}"
        # A row's vector is that of its key, by which it can be found.
        index = {"url": url, "write_batch": 40, "patience_seconds": 30, "encoders": encoders, "forms": ["instruction"]}
        declared = {"declarations": [tmp_path / "tasks.yaml"], "rows_per_task": 2000, "names": ["colours"]}
        # A folder may be called so, and what is written stays in it.
        made[state] = load_settings(state=tmp_path / "run#1 a?b%20c" / state, index=index, tasks=declared | tasks)
        return made[state]

    yield make
    for one in made.values():
        server.stop(one)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_rows(path: Path, things: list[str], broken: bool = False) -> None:
    rows = [json.dumps({"thing": thing, "label": number % 2}) for number, thing in enumerate(things)]
    path.write_text("\n".join(rows + ['{"thing": "a lamp", "label": 7}'] * broken) + "\n")


def contents(settings: Settings) -> dict[str, tuple[str, str, bytes]]:
    """All rows of the version that is searched, with their vectors' bytes."""
    version = open_index(settings, prompt_version()).current()
    names = [name for page in version.identifiers() for name in page]
    return {
        entry.identifier: (entry.task, entry.text, vector.tobytes())
        for part in version.read(names)
        for entry, vector in zip(part.entries, part.vectors, strict=True)
    }


def add_rows(settings: Settings, task: str, texts: list[str]) -> None:
    """Rows that come in with an adapter while the endpoint runs."""
    open_for_writing(settings, prompt_version()).write(entries_of(task, texts), random_vectors(len(texts)))


def entries_of(task: str, keys: list[str]) -> list[Entry]:
    return [Entry(name, task, key) for name, key in zip(row_identifiers(task, keys), keys, strict=True)]


def random_vectors(count: int) -> np.ndarray:
    drawn = np.random.default_rng(count).normal(size=(count, DIMENSIONS))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def seed(settings: Settings, corpora: dict[str, list[str]]) -> None:
    """An index of corpora, by vectors that no encoder made: what is there already is not to be embedded."""
    server.start(settings)
    index = open_for_writing(settings, prompt_version())
    version = NextVersion(index, 0, rebuild=False)
    for task, keys in corpora.items():
        version.write(entries_of(task, keys), random_vectors(len(keys)))
    rows = {task: len(keys) for task, keys in corpora.items()}
    with index.changing():
        version.switch(replace(index.plan(version.version.number), rows=rows, corpora=dict.fromkeys(corpora, "some")))


def test_only_what_is_new_is_embedded_what_is_gone_leaves_and_rows_of_adapters_stay(settings, tmp_path, capsys, monkeypatch):
    corpus = tmp_path / "colours.jsonl"
    things = [f"thing number {number}" for number in range(10)]
    chosen = settings(names=["colours", "wnli"], encoders=1)
    write_rows(corpus, [*things, things[0]], broken=True)
    first = embed_corpora(chosen)
    assert first.server_started
    assert first.switched
    assert first.written == first.rows == {"colours": 11, "wnli": 32}
    # What it lets go of while a job leaves Ray would end the job with exit code 1.
    assert "data-usage-metrics-poller" not in {thread.name for thread in threading.enumerate()}
    print_report(first, chosen)
    assert "colours.jsonl:12: label is '7', not one of 0, 1" in capsys.readouterr().err
    manifest = read_manifest(chosen.state / "index.json")
    assert manifest.rows == first.rows
    assert list(manifest.corpora) == list(manifest.rows)
    index = open_index(chosen, prompt_version())
    with monkeypatch.context() as patch:
        # Whoever serves finds what the router has to know.
        patch.delattr("lorafleet.placing.learn_places")
        assert places_of(index, chosen.state).router.tasks == ("colours", "wnli")
    encoder = Encoder(chosen.models)
    (nearest,) = index.query(encoder.encode(["How do I keep bread fresh?"], 1), 1000)
    assert len(nearest) == 43
    itself = index.query(encoder.encode([nearest[7].text], 1), 1)[0][0]
    assert itself.text == nearest[7].text
    assert itself.similarity == pytest.approx(1, abs=1e-4)

    written = (chosen.state / "index.json").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.delattr("jobs.encoding.embedded")
        again = embed_corpora(chosen)
    assert again.skipped == first.rows
    assert not again.server_started
    assert not again.switched
    assert (chosen.state / "index.json").stat().st_mtime_ns == written
    assert index.numbers() == [manifest.version]

    add_rows(chosen, "seas", ["How deep is the ocean?", "Whales sing."])
    assert read_manifest(chosen.state / "index.json").added == {"seas": 2}
    before = contents(chosen)
    write_rows(corpus, ["another thing", *things[1:7], things[1]])
    second = embed_corpora(chosen)
    # A text whose rows are now two goes as one, and comes as two.
    assert (second.written["colours"], second.skipped["colours"], second.deleted["colours"]) == (3, 5, 6)
    assert index.counts()["colours"] == second.rows["colours"] == 8
    assert (second.written["wnli"], second.deleted["wnli"]) == (0, 0)
    assert second.added == {"seas": 2}
    after = contents(chosen)
    assert len(after) == 41
    assert len(before.items() & after.items()) == 39

    # While a version is filled beside, one adapter comes and another one goes.
    copied = jobs.embed_corpora._copy

    def with_changes(*arguments):
        copied(*arguments)
        open_for_writing(chosen, prompt_version()).delete_task("seas")
        add_rows(chosen, "lakes", ["A lake is still.", "Rowing is fun.", "Cold water."])

    monkeypatch.setattr(jobs.embed_corpora, "_copy", with_changes)
    write_rows(corpus, things[1:7])
    third = embed_corpora(chosen)
    monkeypatch.undo()
    assert third.added == {"lakes": 3}
    assert index.counts() == read_manifest(chosen.state / "index.json").rows == {"colours": 6, "lakes": 3, "wnli": 32}


def test_the_corpus_of_a_task_whose_rows_came_with_an_adapter_is_left_alone(settings, tmp_path):
    write_rows(tmp_path / "colours.jsonl", ["a", "b"])
    chosen = settings(names=["copa", "colours"])
    seed(chosen, {"colours": [KEY.format("a"), KEY.format("b")]})
    add_rows(chosen, "copa", ["The man fell."])
    report = embed_corpora(chosen)
    assert report.added == {"copa": 1}
    assert report.rows == report.skipped == {"colours": 2}
    assert not report.switched


def test_an_index_of_another_encoder_is_embedded_again_with_the_rows_of_adapters(settings, tmp_path):
    write_rows(tmp_path / "colours.jsonl", [f"thing number {number}" for number in range(5)])
    chosen = settings(encoders=1)
    seed(chosen, {"colours": [KEY.format(f"thing number {number}") for number in range(5)], "stale": ["x"]})
    add_rows(chosen, "seas", ["How deep is the ocean?", "Whales sing."])
    before = contents(chosen)
    graph = chosen.model_copy(update={"index": chosen.index.model_copy(update={"links": 16})})
    assert embed_corpora(graph).switched
    assert not embed_corpora(graph).switched
    index = open_for_writing(graph, prompt_version())
    assert index.current().graph_fits
    assert contents(graph) == before

    with index.changing():
        index.publish(replace(index.manifest(), fingerprint="another"))
    other_encoder = chosen.model_copy(update={"models": chosen.models.model_copy(update={"encoder": "someone/else"})})
    for refused in (graph, other_encoder):
        with pytest.raises(IndexMismatch, match=r"has encoder another.*--rebuild"):
            open_index(refused, prompt_version())
        with pytest.raises(IndexMismatch, match=r"has encoder another.*--rebuild"):
            embed_corpora(refused)
    drawn = graph.model_copy(update={"index": graph.index.model_copy(update={"forms": ("instruction", "bare")})})
    plain = index.manifest()
    with index.changing():
        index.publish(replace(plain, prompts=open_for_writing(drawn, prompt_version()).prompts))
    with pytest.raises(IndexMismatch, match=r"its tasks stale are not named.*without --tasks"):
        embed_corpora(drawn, rebuild=True)
    with index.changing():
        index.publish(plain)

    every_task = graph.tasks.model_copy(update={"names": None, "rows_per_task": 5})
    report = embed_corpora(graph.model_copy(update={"tasks": every_task}), rebuild=True)
    assert report.added == {"seas": 2}
    rows = contents(graph)
    assert [row[0] for row in rows.values()].count("colours") == 5
    assert "stale" not in index.counts()
    whales = np.frombuffer(next(row[2] for row in rows.values() if row[1] == "Whales sing."), np.float32)
    np.testing.assert_allclose(whales, Encoder(graph.models).encode(["Whales sing."], 1)[0], atol=1e-5)

    with index.changing():
        index.publish(replace(index.manifest(), prompts="another"))
    with pytest.raises(IndexMismatch, match="has prompt version another"):
        open_index(graph, prompt_version())
    with pytest.raises(IndexMismatch, match="only some tasks are named"):
        embed_corpora(graph, rebuild=True)


def test_the_reason_of_an_encoder_that_failed_is_its_own(settings, tmp_path):
    chosen = settings()
    reading = Reading(chosen, (), tmp_path / "nowhere" / "ledger.sqlite", 0, "plain")
    with pytest.raises(LoRAFleetError) as caught:
        list(embedded(reading, 1))
    assert caught.value.problem == "an encoder failed: OperationalError: unable to open database file"


def test_what_cannot_be_done_leaves_everything_as_it_was(settings, tmp_path):
    chosen = settings()
    seed(chosen, {"colours": ["a", "b"]})
    before = contents(chosen)
    (tmp_path / "colours.jsonl").write_text("")
    with pytest.raises(TaskError, match="no usable row"):
        embed_corpora(chosen)
    write_rows(tmp_path / "colours.jsonl", ["a", "b"])
    with (
        indexing(chosen.state),
        pytest.raises(IndexUnavailable, match="another run"),
    ):
        embed_corpora(chosen)
    no_encoder = chosen.model_copy(update={"models": chosen.models.model_copy(update={"encoder": str(tmp_path)})})
    with pytest.raises(LoRAFleetError, match=str(tmp_path)):
        embed_corpora(no_encoder, rebuild=True)
    assert contents(chosen) == before
    assert open_for_writing(chosen, prompt_version()).numbers() == [1]
    assert not (chosen.state / ".embed").exists()


def test_chroma_that_stays_away_stops_the_run_and_the_next_one_takes_it_up(settings, tmp_path, monkeypatch):
    things = [f"thing number {number}" for number in range(400)]
    write_rows(tmp_path / "colours.jsonl", things[:300])
    chosen = settings()
    seed(chosen, {"colours": [KEY.format(thing) for thing in things]})
    before = contents(chosen)
    impatient = chosen.model_copy(update={"index": chosen.index.model_copy(update={"patience_seconds": 2})})
    monkeypatch.setattr("lorafleet.retrieval.version.ROWS_READ_AT_ONCE", 40)
    written = Version.write

    def write(version, entries, embeddings):
        if version.count() >= 120:
            kill_chroma(chosen)
        written(version, entries, embeddings)

    with monkeypatch.context() as patch:
        patch.setattr(Version, "write", write)
        with pytest.raises(IndexUnavailable, match=r"has not answered for 2 s .*What was written is safe"):
            embed_corpora(impatient)
    server.start(chosen)
    assert rows_beside(chosen) == 120
    assert contents(chosen) == before
    copied: list[str] = []

    def note(version, entries, embeddings):
        copied.extend(entry.identifier for entry in entries)
        written(version, entries, embeddings)

    monkeypatch.setattr(Version, "write", note)
    report = embed_corpora(chosen)
    assert report.deleted == {"colours": 100}
    assert len(copied) == 180
    after = contents(chosen)
    assert len(after) == 300
    assert after.items() <= before.items()


@pytest.mark.drill
def test_chroma_and_the_driver_killed_in_the_middle_leave_what_an_undisturbed_run_leaves(settings, cluster, tmp_path):
    corpus = tmp_path / "colours.jsonl"
    old = [f"thing number {number} {'of many ' * (number % 5)}" for number in range(300)]
    new = [*old[:150], *(f"newer thing {number} {'and more ' * (number % 9)}" for number in range(900))]
    calm = settings("calm")
    seed(calm, {"colours": [KEY.format(thing.strip()) for thing in old]})
    server.stop(calm)
    rough = settings("rough")
    shutil.copytree(calm.chroma, rough.chroma)
    for one in (calm, rough):
        server.start(one)
    before = contents(rough)
    assert before == contents(calm)
    write_rows(corpus, new)
    undisturbed = embed_corpora(calm)
    after = contents(calm)
    assert undisturbed.written == {"colours": 900}

    query = Encoder(rough.models).encode(["a thing"], 1)
    seen: list[int] = []
    over = threading.Event()
    reader = threading.Thread(target=ask_in_a_loop, args=(rough, query, before, after, over, seen))
    reader.start()
    driver = start_driver(rough, cluster.address, tmp_path)
    try:
        wait_until(lambda: rows_beside(rough) > 150, driver)
        kill_chroma(rough)
        time.sleep(1)
        server.start(rough)
        wait_until(lambda: rows_beside(rough) > 500, driver)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        left = rows_beside(rough)
        assert 500 < left < 1050
        assert contents(rough) == before
        taken_up = embed_corpora(rough)
        wait_until(lambda: seen[-1:] == [len(after)])
    finally:
        driver.kill()
        over.set()
        reader.join()

    # A batch that was on its way when the driver died may have come since; none is written once more.
    assert 0 < taken_up.written["colours"] <= len(after) - left
    assert contents(rough) == after
    assert set(seen) == {len(before), len(after)}, "a reader saw a part, or nothing"
    assert seen == sorted(seen), "a reader went back"
    index = open_for_writing(rough, prompt_version())
    assert index.numbers() == [index.manifest().version]
    assert index.manifest().corpora == open_for_writing(calm, prompt_version()).manifest().corpora


def start_driver(settings: Settings, address: str, folder: Path) -> "subprocess.Popen[bytes]":
    """The job in a process of its own."""
    index, tasks = settings.index, settings.tasks
    overrides = {
        "index.url": index.url,
        "index.write_batch": index.write_batch,
        "index.forms": f"[{','.join(index.forms)}]",
        "tasks.declarations": f"[{tasks.declarations[0]}]",
        "tasks.rows_per_task": tasks.rows_per_task,
    }
    sets = [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "jobs.embed_corpora", "--state", str(settings.state), "--tasks", "colours", *sets]
    with (folder / "driver.log").open("wb") as log:
        return subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": address}, stdout=log, stderr=log)


def rows_beside(settings: Settings) -> int:
    """How many rows the version has that nobody searches yet."""
    index = open_for_writing(settings, prompt_version())
    version = index.version(index.numbers()[-1])
    return version.count() if version and version.number != index.manifest().version else 0


def kill_chroma(settings: Settings) -> None:
    os.kill(read_json(server.run_folder_of(settings) / "chroma.json")["pid"], signal.SIGKILL)
    while server.running(settings):
        time.sleep(0.05)


def wait_until(there: Callable[[], bool], driver: "subprocess.Popen[bytes] | None" = None) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not there():
        assert driver is None or driver.poll() is None, "the driver ended too soon"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ask_in_a_loop(settings, query, before, after, over, seen) -> None:
    """Note how many rows the index has that a reader finds, the one before or the one after; -1 for a mix, or a part.

    A graph reaches nearly all of its rows, and not always every one.
    """
    texts = {len(rows): {row[1] for row in rows.values()} for rows in (before, after)}
    reader = open_index(settings, prompt_version())
    while not over.is_set():
        found = {row.text for row in reader.query(query, 5000)[0]}
        seen.append(next((rows for rows, known in texts.items() if found <= known and len(found) > 0.99 * len(known)), -1))
        time.sleep(0.05)
