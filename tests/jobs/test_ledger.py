"""What is to be done follows from the corpora and the index, whatever their size."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.ledger import Ledger
from jobs.parcels import ROWS_PER_PARCEL, Reading
from lorafleet.config import Index, load_settings
from lorafleet.errors import TaskError
from lorafleet.retrieval import copies_of, row_identifiers
from lorafleet.tasks import CorpusRows, load_corpus
from lorafleet.tasks.catalogue import read_declarations

DECLARATION = """
colours:
  family: test
  files: {train: colours.jsonl}
  instruction: Name the colour.
  text: "Thing: {thing}"
  options: [red, green]
  label: label
"""


@pytest.fixture
def corpus(tmp_path: Path):
    """The rows of a task of one's own, at most so many of them, and what reads them."""
    (tmp_path / "tasks.yaml").write_text(DECLARATION)
    (task,) = read_declarations(tmp_path / "tasks.yaml")

    def corpus(things: list[str], most: int = 10_000) -> tuple[CorpusRows, list[str], Reading]:
        lines = [json.dumps({"thing": thing, "label": 0}) for thing in things]
        (tmp_path / "colours.jsonl").write_text("\n".join(lines) + "\n")
        settings = load_settings(state=tmp_path, tasks={"rows_per_task": most}, index=dict(INDEX))
        keys = [example.key for example in load_corpus(task, "train", settings.tasks).examples]
        reading = Reading(settings, (task,), tmp_path / "ledger.sqlite", 0, "plain")
        return CorpusRows(task, "train", settings.tasks), row_identifiers("colours", keys), reading

    return corpus


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite", writable=True)


COLOURS = frozenset({"colours"})
INDEX = Index(forms=("instruction",))


def flat(pages) -> list[str]:
    return [identifier for page in pages for identifier in page]


@pytest.mark.parametrize("most", [10_000, 7])
def test_the_rows_that_are_indexed_are_those_that_the_adapter_is_trained_on_and_equal_ones_are_one_text(
    corpus, ledger, most
):
    rows, identifiers, _ = corpus([f"thing {number}" for number in range(30)] + ["thing 3", "thing 3"], most)
    ledger.note_corpus(rows, INDEX)
    ledger.note_aim(anew=False, other_encoder=False)
    assert sorted(name for _, name, _ in ledger.missing("colours")) == sorted(set(identifiers))
    assert ledger.rows() == {"colours": min(most, 32)}


def test_a_text_whose_number_of_rows_changes_goes_and_comes_with_all_of_them(corpus, ledger):
    before = corpus(["a", "b", "b", "b", "b", "b"])[1]
    rows, identifiers, _ = corpus(["a", "b", "c", "b", "b", "b", "c"])
    a, b, c = (name for copies in (1, 4, 2) for name in set(identifiers) if copies_of(name) == copies)
    ledger.note_corpus(rows, INDEX)
    ledger.note_indexed(set(before), COLOURS)
    ledger.note_aim(anew=False, other_encoder=False)

    assert [(place, name) for place, name, _ in ledger.missing("colours")] == [(1, b), (2, c)]
    assert ledger.gone("colours") == 5
    assert flat(ledger.kept()) == [a]
    assert ledger.rows() == {"colours": 7}


def test_rows_that_differ_where_it_is_not_embedded_are_one_text(corpus, ledger, tmp_path):
    bare = Index(forms=("bare",))
    rows, *_ = corpus(["a fox", "a fox ", "a hen"])
    ledger.note_corpus(rows, bare)
    ledger.note_aim(anew=False, other_encoder=False)
    assert sorted(name for _, name, _ in ledger.missing("colours")) == sorted(
        set(row_identifiers("colours", ["a fox", "a hen", "a fox"]))
    )


def test_what_is_missing_gone_and_kept(corpus, ledger):
    rows, identifiers, _ = corpus([f"thing {number}" for number in range(6)])
    others = row_identifiers("seas", ["a", "b"])
    old = row_identifiers("colours", ["gone", "gone, too"])
    ledger.note_corpus(rows, INDEX)
    ledger.note_indexed([*identifiers[:4], *old, *others], COLOURS)
    ledger.note_built([identifiers[0], identifiers[4], old[0], others[0]])
    ledger.note_aim(anew=False, other_encoder=False)

    assert {name: built for _, name, built in ledger.missing("colours")} == {identifiers[4]: True, identifiers[5]: False}
    assert ledger.to_embed("colours") == 1
    assert ledger.gone("colours") == 2
    assert flat(ledger.kept()) == sorted([*identifiers[1:4], others[1]])
    assert ledger.to_keep() == 4
    assert flat(ledger.unwanted()) == [old[0]]
    assert ledger.rows() == {"colours": 6, "seas": 2}
    assert list(ledger.others_missing()) == []


@pytest.mark.parametrize("other_encoder", [False, True])
def test_embedded_anew_a_corpus_keeps_no_vector_and_the_rows_of_others_only_those_of_the_same_encoder(
    corpus, ledger, other_encoder
):
    rows, identifiers, _ = corpus(["a", "b", "c"])
    others = row_identifiers("seas", ["a"])
    ledger.note_corpus(rows, INDEX)
    ledger.note_indexed([*identifiers, *others], COLOURS)
    ledger.note_aim(anew=True, other_encoder=other_encoder)
    assert ledger.to_embed("colours") == 3
    assert flat(ledger.kept()) == ([] if other_encoder else others)
    assert list(ledger.others_missing()) == ([(others[0], False)] if other_encoder else [])
    assert ledger.others_to_embed() == int(other_encoder)


def test_a_run_that_is_taken_up_makes_the_same_parcels_and_leaves_out_those_that_are_there(corpus, ledger):
    rows, _, reading = corpus([f"{'long ' * (number % 7)}thing {number}" for number in range(3 * ROWS_PER_PARCEL + 5)])
    ledger.note_corpus(rows, INDEX)
    ledger.note_aim(anew=False, other_encoder=False)
    whole = [[row.entry for row in parcel] for parcel in reading.parcels()]
    assert [len(parcel) for parcel in whole] == [ROWS_PER_PARCEL] * 3 + [5]
    lengths = [len(entry.text) for parcel in whole for entry in parcel]
    assert lengths == sorted(lengths, reverse=True)

    ledger.note_built([entry.identifier for entry in [*whole[1], *whole[2][:50]]])
    left = [[row.entry for row in parcel] for parcel in reading.parcels()]
    assert left == [whole[0], whole[2], whole[3]]


@pytest.mark.parametrize(
    ("forms", "pooling", "texts"),
    [
        (("instruction", "bare"), "mean", ("Name the colour.\nThing: a fox", "a fox")),
        (("bare",), "drawn", ("a fox",)),
    ],
)
def test_a_row_is_read_with_the_texts_that_its_vector_is_the_mean_of(corpus, ledger, tmp_path, forms, pooling, texts):
    rows, _, reading = corpus(["a fox"])
    settings = load_settings(state=tmp_path, index={"forms": forms, "pooling": pooling})
    ledger.note_corpus(rows, settings.index)
    ledger.note_indexed(row_identifiers("seas", ["deep"]), COLOURS)
    ledger.note_aim(anew=False, other_encoder=False)
    ((row,),) = replace(reading, settings=settings).parcels()
    assert (row.entry.identifier, row.entry.text) == (*row_identifiers("colours", [texts]), "Name the colour.\nThing: a fox")
    assert row.texts == texts


def test_a_corpus_that_changes_between_two_readings_is_refused(corpus, ledger):
    rows, _, reading = corpus(["a", "b", "c"])
    ledger.note_corpus(rows, INDEX)
    ledger.note_aim(anew=False, other_encoder=False)
    for changed in (["a", "b", "d"], ["a", "b"]):
        corpus(changed)
        with pytest.raises(TaskError, match="changed while they were read"):
            list(reading.parcels())


def test_a_corpus_of_bad_rows_alone_is_refused_with_the_first_of_them(corpus, ledger, tmp_path):
    rows, _, _ = corpus(["a"])
    (tmp_path / "colours.jsonl").write_text('\n{"thing": NaN, "label": 0}\n{"thing": "b", "label": 2}\n')
    with pytest.raises(TaskError, match=r"of 2 bad rows, the first is .*colours\.jsonl:2: column thing is missing"):
        ledger.note_corpus(rows, INDEX)
    (tmp_path / "colours.jsonl").write_text("")
    with pytest.raises(TaskError, match=r"no usable row in .*colours\.jsonl: it is empty"):
        ledger.note_corpus(rows, INDEX)


def test_the_fingerprint_is_of_the_rows_and_not_of_their_order(corpus, tmp_path):
    digests = []
    for number, things in enumerate((["a", "b", "b"], ["b", "a", "b"], ["a", "b"])):
        ledger = Ledger(tmp_path / f"{number}.sqlite", writable=True)
        ledger.note_corpus(corpus(things)[0], INDEX)
        digests.append(ledger.fingerprint("colours"))
    assert digests[0] == digests[1] != digests[2]


ODD = ["run#1", "a?mode=memory", "50%", "a%20b", " 'q' \"d\"", "ü\u2028\n", "-x", "[a]*", "file:x", "a&b;c"]


@pytest.mark.parametrize("name", ODD)
def test_a_ledger_lies_in_its_folder_whatever_that_is_called(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    for folder in (tmp_path / name, Path(name)):
        path = folder / "ledger.sqlite"
        written = Ledger(path, writable=True)
        written.note_indexed(["colours-digest-1"], COLOURS)
        assert Ledger(path).gone("colours") == 1
        written.close()
        path.unlink()
    assert [path.name for path in tmp_path.rglob("*")] == [name]
