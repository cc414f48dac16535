"""The next version of the index, filled while the one before is searched."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from lorafleet.config import Settings, load_settings
from lorafleet.errors import IndexUnavailable
from lorafleet.retrieval import (
    CorpusIndex,
    Entry,
    NextVersion,
    Vectors,
    one_at_a_time,
    open_for_writing,
    open_index,
    row_identifiers,
    server,
)

pytestmark = pytest.mark.integration

PROMPTS = "plain"


def rows(said: str, count: int) -> tuple[list[Entry], Vectors]:
    """Rows that all say which corpus they are of."""
    keys = [f"{said} {number}" for number in range(count)]
    entries = [Entry(name, "alpha", key) for name, key in zip(row_identifiers("alpha", keys), keys, strict=True)]
    drawn = np.random.default_rng(count).normal(size=(count, 64))
    return entries, (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def switched(index: CorpusIndex, said: str, count: int) -> None:
    """Another corpus in the place of the one before."""
    before = index.manifest()
    version = NextVersion(index, before.version if before else 0, rebuild=False)
    version.write(*rows(said, count))
    with index.changing():
        version.switch(index.plan(version.version.number))
    version.delete_others()


def contents(index: CorpusIndex, number: int) -> dict[str, tuple[str, bytes]]:
    version = index.version(number)
    assert version is not None
    names = [name for page in version.identifiers() for name in page]
    return {
        entry.identifier: (entry.text, vector.tobytes())
        for part in version.read(names)
        for entry, vector in zip(part.entries, part.vectors, strict=True)
    }


@pytest.fixture
def index(served: Settings) -> Iterator[CorpusIndex]:
    made = open_for_writing(served, PROMPTS)
    yield made
    made.drop()


def test_who_searches_finds_one_version_whole_whatever_happens_meanwhile(served, index, monkeypatch):
    # Searches that are under way while their version is deleted.
    monkeypatch.setattr("lorafleet.retrieval.building.SEARCH_SECONDS", 0)
    switched(index, "first", 200)
    queries = rows("first", 200)[1][:130]
    sizes = {"first": 200, "second": 90, "third": 310, "fourth": 150}
    found: list[list[str]] = [[], []]
    over = threading.Event()

    def ask(answers: list[str]) -> None:
        reader = open_index(served, PROMPTS)
        while not over.is_set():
            near = reader.query(queries, 400)
            said = {row.text.split()[0] for row in near[0]} | {row.text.split()[0] for row in near[-1]}
            assert len(said) == 1, "a mix of two versions"
            assert {len(row) for row in near} == {sizes[min(said)]}, "a part of a version"
            answers.append(min(said))

    readers = [threading.Thread(target=ask, args=(answers,)) for answers in found]
    for reader in readers:
        reader.start()
    for said, count in sizes.items():
        if said != "first":
            switched(index, said, count)
        while any(answers[-1:] != [said] for answers in found) and all(reader.is_alive() for reader in readers):
            time.sleep(0.02)
    over.set()
    for reader in readers:
        reader.join()

    for answers in found:
        assert set(answers) == set(sizes)
        assert answers == sorted(answers, key=list(sizes).index), "a reader went back"
    assert len(index.numbers()) == 1


def test_what_a_killed_run_has_left_is_taken_up_where_it_fits_and_deleted_where_not(served, index):
    switched(index, "first", 20)
    left = NextVersion(index, 1, rebuild=False)
    left.write(*rows("second", 8))
    assert open_index(served, PROMPTS).counts() == {"alpha": 20}

    again = NextVersion(index, 1, rebuild=False)
    assert again.taken_up
    assert again.version.counts() == {"alpha": 8}

    for wished in ({"links": 48}, {"construction_breadth": 100}):
        other = load_settings(state=served.state, index=dict(served.index) | wished)
        afresh = NextVersion(open_for_writing(other, PROMPTS), 1, rebuild=False)
        assert not afresh.taken_up
        assert afresh.version.count() == 0
        assert afresh.version.graph_fits
    assert not NextVersion(open_for_writing(served, "fancy"), 1, rebuild=False).taken_up
    assert not NextVersion(index, 1, rebuild=True).taken_up
    assert NextVersion(index, 1, rebuild=True).taken_up
    assert len(index.numbers()) == 2
    assert open_index(served, PROMPTS).counts() == {"alpha": 20}


def test_rows_are_copied_bit_for_bit_however_often(served, index, monkeypatch):
    monkeypatch.setattr("lorafleet.retrieval.building.SEARCH_SECONDS", 0)
    switched(index, "first", 50)
    written = {entry.identifier: (entry.text, row.tobytes()) for entry, row in zip(*rows("first", 50), strict=True)}
    for number in (1, 2, 3):
        assert contents(index, number) == written
        source = index.version(number)
        following = NextVersion(index, number, rebuild=False)
        assert sum(following.copy(list(written), source)) == 50
        with index.changing():
            following.switch(index.plan(number + 1))
        following.delete_others()


def test_without_a_server_the_folder_is_searched_in_its_current_version(index_settings):
    settings = index_settings()
    server.start(settings)
    try:
        writer = open_for_writing(settings, PROMPTS)
        switched(writer, "first", 10)
        switched(writer, "second", 12)
        NextVersion(writer, 2, rebuild=False).write(*rows("third", 5))
    finally:
        server.stop(settings)
    assert open_index(settings, PROMPTS).counts() == {"alpha": 12}


def test_two_who_change_the_index_wait_for_each_other(served, index):
    hasty = load_settings(state=served.state, index=dict(served.index) | {"patience_seconds": 0.2})
    with index.changing(), pytest.raises(IndexUnavailable, match="another process changes the index"):
        open_for_writing(hasty, PROMPTS).write(*rows("first", 2))
    open_for_writing(hasty, PROMPTS).write(*rows("first", 2))
    assert index.counts() == {"alpha": 2}


def test_a_lock_goes_with_whoever_held_it(tmp_path):
    with one_at_a_time(tmp_path / "lock", 0, "taken", "wait"):
        pass
    with one_at_a_time(tmp_path / "lock", 0, "taken", "wait"), pytest.raises(IndexUnavailable, match="taken"):
        one_at_a_time(tmp_path / "lock", 0, "taken", "wait").__enter__()
