"""Rows with the same text: one vector of the graph, and as many neighbours as they are rows."""

from collections import Counter

import numpy as np
import pytest

from lorafleet.config import Settings
from lorafleet.placing import places_of
from lorafleet.retrieval import CorpusIndex, Encoder, Entry, ExactIndex, Vectors, open_for_writing, row_identifiers
from lorafleet.retrieval.backup import export_index, import_index
from lorafleet.tasks import prompt_version
from lorafleet.weighing import task_shares

pytestmark = pytest.mark.integration

SAME = "The parcel has not come, where is it?"
Corpora = dict[str, list[str]]


@pytest.fixture(scope="module")
def embedded(served: Settings) -> dict[str, Vectors]:
    """Some texts of one kind, and one that stands apart, with their vectors."""
    asked = ("Where do {} live?", "What do {} eat?", "How old do {} grow?", "Are {} kept as pets?")
    animals = [f"{kind} {animal}" for kind in KINDS for animal in ANIMALS]
    texts = [SAME, *(question.format(animal) for question in asked for animal in animals)]
    return dict(zip(texts, Encoder(served.models).encode(texts, 32), strict=True))


KINDS = ("small", "wild", "white", "young", "brown", "northern")
ANIMALS = ("foxes", "owls", "bears", "hens", "otters", "swans", "mice", "goats", "seals", "hares", "crows", "lynxes")


@pytest.fixture
def index(served: Settings):
    made = open_for_writing(served, prompt_version())
    made.drop()
    yield made
    made.drop()


def write(index: CorpusIndex, corpora: Corpora, embedded: dict[str, Vectors]) -> None:
    for task, texts in corpora.items():
        entries = [Entry(name, task, text) for name, text in zip(row_identifiers(task, texts), texts, strict=True)]
        index.write(entries, np.stack([embedded[text] for text in texts]))


def exact(corpora: Corpora, embedded: dict[str, Vectors]) -> ExactIndex:
    """All rows, each with its own vector."""
    return ExactIndex(corpora, {task: np.stack([embedded[text] for text in texts]) for task, texts in corpora.items()})


def assert_alike(index: CorpusIndex, corpora: Corpora, embedded: dict[str, Vectors], asked: list[str], **wishes) -> None:
    """The neighbours and the shares of queries are those of a search among all rows, one by one."""
    queries = np.stack([embedded[text] for text in asked])
    found, wanted = (one.query(queries, 100, **wishes) for one in (index, exact(corpora, embedded)))
    for near, right in zip(found, wanted, strict=True):
        np.testing.assert_allclose([row.similarity for row in near], [row.similarity for row in right], atol=1e-5)
        # Which of several equal rows at the end of a list are in it is left open.
        last = right[-1].similarity + 1e-5
        inside = [Counter((row.task, row.text) for row in rows if row.similarity > last) for rows in (near, right)]
        assert inside[0] == inside[1]
        ends = [{row.task for row in rows if row.similarity <= last} for rows in (near, right)]
        if ends[0] == ends[1] and len(ends[0]) == 1:
            assert task_shares(near) == pytest.approx(task_shares(right), abs=1e-4)


@pytest.mark.parametrize("copies", [0, 100, 2000])
def test_many_equal_rows_hide_no_others_and_weigh_as_many(index, embedded, copies):
    questions = [text for text in embedded if text != SAME]
    corpora = {"animals": questions[::2] + questions[1::2] * 3}
    if copies:
        corpora = {"tickets": [SAME] * copies, **corpora}
    write(index, corpora, embedded)
    assert_alike(index, corpora, embedded, [*questions[::3], SAME])
    assert index.counts() == {task: len(texts) for task, texts in sorted(corpora.items())}
    assert index.current().count() == len(questions) + (copies > 0)
    without = index.query(np.stack([embedded[SAME]]), 100, texts=False)[0]
    assert Counter(row.task for row in without)["tickets"] == min(copies, 100)
    assert {row.text for row in without} == {""}


def test_a_text_that_very_many_tasks_have_hides_no_others(index, embedded):
    questions = [text for text in embedded if text != SAME]
    corpora = {f"task{number}": [SAME, questions[number % 10], questions[number % len(questions)]] for number in range(400)}
    entries = [
        Entry(name, task, text)
        for task, texts in corpora.items()
        for name, text in zip(row_identifiers(task, texts), texts, strict=True)
    ]
    index.write(entries, np.stack([embedded[entry.text] for entry in entries]))
    assert_alike(index, corpora, embedded, questions)
    assert index.current().count() == len(embedded)
    assert index.counts() == dict.fromkeys(sorted(corpora), 3)


def test_tasks_that_share_a_text_come_go_and_are_masked_each_by_itself(index, embedded, tmp_path):
    few = [text for text in embedded if text != SAME][:60]
    corpora = {"seas": [SAME] * 3 + few[:20], "lakes": few[10:30] + [SAME] * 2, "hills": [*few[20:], SAME]}
    write(index, corpora, embedded)
    asked = [SAME, *few[::7]]
    assert_alike(index, corpora, embedded, asked)
    assert_alike(index, corpora, embedded, asked, without="lakes")
    assert_alike(index, corpora, embedded, asked, tasks=["seas", "hills"])
    assert_alike(index, corpora, embedded, asked, tasks=["seas", "hills"], without="hills")
    assert index.identifiers("lakes") == set(row_identifiers("lakes", corpora["lakes"]))

    mean = np.mean([embedded[text] for text in corpora["seas"]], axis=0)
    places = places_of(index, tmp_path)
    np.testing.assert_allclose(places.prototypes.vectors[places.prototypes.tasks.index("seas")], mean, atol=1e-5)

    export_index(index, tmp_path / "index.parquet")
    index.delete_task("seas")
    left = {task: texts for task, texts in corpora.items() if task != "seas"}
    assert_alike(index, left, embedded, asked)
    assert index.manifest().rows == {"hills": 41, "lakes": 22}
    # An identifier that counts otherwise is not there.
    index.delete(row_identifiers("hills", [SAME, SAME]))
    assert index.counts() == {"hills": 41, "lakes": 22}
    index.delete(row_identifiers("hills", [SAME]))
    assert index.counts() == {"hills": 40, "lakes": 22}
    write(index, {"lakes": [SAME] * 5}, embedded)
    assert index.counts() == {"hills": 40, "lakes": 25}
    assert_alike(index, {"hills": few[20:], "lakes": few[10:30] + [SAME] * 5}, embedded, asked)

    seen = []
    manifest = import_index(index, tmp_path / "index.parquet", seen.append)
    assert sum(seen) == sum(manifest.rows.values()) == 86
    assert_alike(index, corpora, embedded, asked)


def test_a_long_text_with_odd_characters_comes_back_as_it_was(index):
    text = 'a "quoted" \\ line\n\u2028\x00?/#%41 ' + "long “words” " * 10_000
    vector = np.full((1, 8), 8**-0.5, np.float32)
    index.write([Entry(row_identifiers("seas", [text])[0], "seas", text)], vector)
    assert index.query(vector, 5)[0][0].text == text
