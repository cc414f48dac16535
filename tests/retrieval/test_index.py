import os
import signal
import threading
import time

import numpy as np
import pytest

from lorafleet.config import Settings, load_settings
from lorafleet.errors import IndexMismatch, IndexUnavailable
from lorafleet.retrieval import Entry, copies_of, open_for_writing, open_index, read_manifest, row_identifiers, server
from lorafleet.storage import read_json

DIMENSIONS = 384
PROMPTS = "plain"
TASKS = ("alpha", "beta", "gamma", "delta")


def vectors(rows: int, seed: int) -> np.ndarray:
    """Clustered unit vectors, as the keys of a few tasks are."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(20, DIMENSIONS))
    drawn = centres[random.integers(0, 20, rows)] + random.normal(size=(rows, DIMENSIONS))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def entries(rows: int) -> list[Entry]:
    return [
        Entry(identifier, task, f"{task} row {number}")
        for task in TASKS
        for number, identifier in enumerate(row_identifiers(task, (f"{task} row {n}" for n in range(rows // len(TASKS)))))
    ]


def kill(settings: Settings) -> None:
    os.kill(read_json(server.run_folder_of(settings) / "chroma.json")["pid"], signal.SIGKILL)
    while server.running(settings):
        time.sleep(0.05)


def test_a_text_keeps_its_identifier_when_others_come_and_go_and_counts_its_rows():
    first = row_identifiers("wnli", ["a", "b", "a"])

    assert first[0] == first[2] != first[1]
    assert [copies_of(identifier) for identifier in first] == [2, 1, 2]
    assert row_identifiers("wnli", ["c", "a", "a", "b"])[1:] == [first[0], first[2], first[1]]
    assert row_identifiers("wnli", ["b", "a"])[0] == first[1] != row_identifiers("wnli", ["b", "b"])[0]
    assert not set(row_identifiers("rte", ["a", "b"])) & set(first)
    assert row_identifiers("wnli", [("a", "a", "a")]) == row_identifiers("wnli", ["a"])
    assert len(set(row_identifiers("wnli", [("a", "b"), ("b", "a"), "ab"]))) == 3


@pytest.mark.integration
def test_neighbours_are_those_of_exact_search(served):
    rows, embeddings, queries = entries(4000), vectors(4000, seed=1), vectors(100, seed=2)
    index = open_for_writing(served, PROMPTS)
    index.write(rows, embeddings)
    similarities = queries @ embeddings.T
    tasks = np.array([row.task for row in rows])

    for allowed, asked in (
        (np.full(len(rows), True), {}),
        (tasks != "beta", {"without": "beta"}),
        ((tasks == "alpha") | (tasks == "gamma"), {"tasks": ["alpha", "gamma"]}),
    ):
        exact = np.argsort(-np.where(allowed, similarities, -2), axis=1)[:, :100]
        found = open_index(served, PROMPTS).query(queries, 100, **asked)
        hits = [len({n.text for n in near} & {rows[i].text for i in best}) for near, best in zip(found, exact, strict=True)]
        assert sum(hits) / (100 * len(queries)) >= 0.98
        near, best = found[0], similarities[0][exact[0]]
        assert {n.task for n in near} <= set(tasks[allowed])
        np.testing.assert_allclose([n.similarity for n in near[:10]], best[:10], atol=1e-5)
        assert [n.similarity for n in near] == sorted((n.similarity for n in near), reverse=True)
    index.drop()


@pytest.mark.integration
def test_writing_again_adds_nothing_and_deleting_takes_only_what_is_named(served):
    rows, embeddings = entries(40), vectors(40, seed=3)
    index = open_for_writing(served, PROMPTS)
    assert index.identifiers("alpha") == set()
    index.write(rows, embeddings)
    index.write(rows, embeddings)
    assert index.counts() == dict.fromkeys(sorted(TASKS), 10)

    index.delete([row.identifier for row in rows if row.task == "beta"][:4])

    assert index.counts() == {"alpha": 10, "beta": 6, "delta": 10, "gamma": 10}
    assert index.identifiers("beta") == {row.identifier for row in rows if row.task == "beta"} - {
        row.identifier for row in rows[10:14]
    }
    index.drop()


@pytest.mark.integration
def test_an_index_that_does_not_fit_is_refused(served):
    with pytest.raises(IndexMismatch, match="lorafleet embed"):
        open_index(served, PROMPTS)
    index = open_for_writing(served, PROMPTS)
    index.write(entries(4), vectors(4, seed=4))
    open_index(served, PROMPTS)

    other_encoder = load_settings(state=served.state, index=dict(served.index), models={"encoder": "someone/else"})
    with pytest.raises(IndexMismatch, match=r"has encoder \w+, not someone/else@main.*--rebuild"):
        open_index(other_encoder, PROMPTS)
    with pytest.raises(IndexMismatch, match=r"has encoder \w+, not someone/else@main.*--rebuild"):
        open_for_writing(other_encoder, PROMPTS).write(entries(4), vectors(4, seed=4))
    with pytest.raises(IndexMismatch, match=r"has prompt version plain-\S+-drawn, not fancy-.*--rebuild"):
        open_index(served, "fancy")
    other_forms = load_settings(state=served.state, index={**dict(served.index), "forms": ["instruction", "bare"]})
    with pytest.raises(IndexMismatch, match=r"has prompt version \S+, not plain-instruction-bare-drawn\. .*--rebuild"):
        open_index(other_forms, PROMPTS)
    keys = load_settings(state=served.state, index={**dict(served.index), "forms": ["instruction"], "pooling": "mean"})
    with pytest.raises(IndexMismatch, match=r"has prompt version \S+, not plain\. .*--rebuild"):
        open_index(keys, PROMPTS)
    index.drop()


@pytest.mark.integration
def test_an_index_of_another_version_of_lorafleet_is_refused_with_the_way_out(served):
    index = open_for_writing(served, PROMPTS)
    index.write(entries(4), vectors(4, seed=4))
    described = index.connection.find(served.index.collection)
    described.modify(metadata={**described.metadata, "schema": 2})
    for ask in (lambda: open_index(served, PROMPTS), lambda: index.write(entries(4), vectors(4, seed=4))):
        with pytest.raises(IndexMismatch, match=r"has schema 2, not 3\. .*lorafleet embed --rebuild"):
            ask()
    index.drop()


@pytest.mark.integration
def test_an_index_made_anew_by_another_process_is_found_again(served):
    rows, embeddings = entries(8), vectors(8, seed=5)
    open_for_writing(served, PROMPTS).write(rows, embeddings)
    reader = open_index(served, PROMPTS)
    writer = open_for_writing(served, PROMPTS)
    writer.drop()
    writer.write(rows[:4], embeddings[:4])

    assert len(reader.query(embeddings[:1], 100)[0]) == 4
    writer.drop()
    with pytest.raises(IndexMismatch):
        reader.query(embeddings[:1], 100)


@pytest.mark.integration
def test_a_server_killed_in_the_middle_of_a_write_costs_nothing(index_settings):
    settings = index_settings(write_batch=50)
    rows, embeddings = entries(1600), vectors(1600, seed=6)
    server.start(settings)
    try:
        index = open_for_writing(settings, PROMPTS)
        writing = threading.Thread(target=index.write, args=(rows, embeddings))
        writing.start()
        while not ((version := open_for_writing(settings, PROMPTS).version(1)) and 0 < version.count() < 1600):
            assert writing.is_alive()
            time.sleep(0.02)
        kill(settings)
        time.sleep(1)
        assert writing.is_alive()
        server.start(settings)
        writing.join(60)
        assert not writing.is_alive()
        assert open_index(settings, PROMPTS).counts() == dict.fromkeys(sorted(TASKS), 400)
        manifest = read_manifest(settings.state / "index.json")
        assert manifest is not None
        assert manifest.rows == manifest.added == dict.fromkeys(sorted(TASKS), 400)

        kill(settings)
        answers: list = []
        asking = threading.Thread(target=lambda: answers.extend(index.query(embeddings[:2], 5)))
        asking.start()
        time.sleep(1)
        server.start(settings)
        asking.join(60)
        assert [near[0].text for near in answers] == [rows[0].text, rows[1].text]
    finally:
        server.stop(settings)


@pytest.mark.integration
def test_without_a_server_the_folder_is_searched_and_a_lost_server_is_reported(index_settings):
    settings = index_settings(patience_seconds=1)
    rows, embeddings = entries(80), vectors(80, seed=7)
    server.start(settings)
    try:
        index = open_for_writing(settings, PROMPTS)
        index.write(rows, embeddings)
        over_http = index.query(embeddings[:3], 10)
    finally:
        server.stop(settings)

    began = time.monotonic()
    with pytest.raises(IndexUnavailable, match="What was written is safe"):
        index.query(embeddings[:1], 10)
    assert time.monotonic() - began < 10
    assert [[near.text for near in row] for row in open_index(settings, PROMPTS).query(embeddings[:3], 10)] == [
        [near.text for near in row] for row in over_http
    ]
