"""Tasks: the catalogue, the sample pack, rendering, a user's own task, and damaged rows."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lorafleet.config import Tasks
from lorafleet.errors import TaskError, TooManyBadRows
from lorafleet.tasks import Task, load_catalogue, load_corpus
from lorafleet.tasks.task import BadRowError, OptionList

FAMILIES = {
    "commonsense": {"commonsense_qa", "piqa", "copa", "cosmos_qa", "hellaswag", "story_cloze"},
    "question_answering": {"squad", "record", "boolq", "multirc", "openbookqa"},
    "inference": {"mnli", "rte", "cb", "anli_r3", "wnli"},
    "paraphrase": {"mrpc", "qqp", "paws"},
    "sentiment": {"sst2", "yelp_review_full", "imdb"},
    "lexical": {"wic"},
}
OWN_TASK = """
colour:
  family: mine
  files: {train: rows.%s}
  instruction: Name the colour of the thing.
  text: "Thing: {thing}"
  options: [red, green, blue]
  label: colour
  labels: [r, g, b]
"""


def test_the_catalogue_is_the_papers():
    catalogue = load_catalogue(Tasks())
    found: dict[str, set[str]] = {}
    for task in catalogue.values():
        found.setdefault(task.family, set()).add(task.name)
    assert found == FAMILIES
    assert {task.name for task in catalogue.values()} - {task.name for task in catalogue.trained} == {"imdb"}


def test_the_sample_pack_is_whole_and_balanced():
    catalogue = load_catalogue(Tasks())
    for task in catalogue.values():
        evaluation = load_corpus(task, "evaluation", Tasks())
        corpora = [evaluation, *([load_corpus(task, "train", Tasks())] if task.trained else [])]
        assert sum(len(corpus.examples) for corpus in corpora) >= (40 if task.trained else 10), task.name
        assert len(evaluation.examples) >= 10
        seen: set[str] = set()
        for corpus in corpora:
            assert corpus.bad_rows == ()
            prompts = {(example.prompt, example.options) for example in corpus.examples}
            assert len(prompts) == len(corpus.examples), f"{task.name} has a row twice"
            assert not seen & {example.prompt for example in corpus.examples}, f"{task.name} trains on evaluation rows"
            seen |= {example.prompt for example in corpus.examples}
            if task.answers is None:
                places = Counter(example.options.index(example.answer) for example in corpus.examples)
                assert max(places.values()) - min(places.values()) <= 1, (task.name, places)


def test_an_example_holds_the_answer_nowhere_but_in_its_answers():
    catalogue = load_catalogue(Tasks(names=["commonsense_qa", "record", "wic"]))
    (example,) = [e for e in load_corpus(catalogue["wic"], "train", Tasks()).examples if "time to plant garlic" in e.key]
    assert example.key.startswith("Does the word have the same meaning in both sentences, yes or no?\nWord: plant\n")
    assert example.prompt == example.key + "\nSame meaning:"
    assert (example.answer, example.options) == ("yes", ("no", "yes"))
    for example in load_corpus(catalogue["commonsense_qa"], "train", Tasks()).examples:
        assert example.answer in example.options and not any(
            option in example.prompt.split(": ")[-1] for option in example.options
        )
    assert all(e.answers and not e.options for e in load_corpus(catalogue["record"], "train", Tasks()).examples)


def test_rows_are_bounded_and_their_order_depends_on_the_seed_alone():
    task = load_catalogue(Tasks())["copa"]
    whole = load_corpus(task, "train", Tasks())
    few = load_corpus(task, "train", Tasks(rows_per_task=5))
    assert few.examples == whole.examples[:5]
    assert load_corpus(task, "train", Tasks()).fingerprint == whole.fingerprint != few.fingerprint
    other = load_corpus(task, "train", Tasks(seed=1))
    assert other.examples != whole.examples and set(other.examples) == set(whole.examples)


def test_validation_rows_are_those_that_are_kept_from_training(tmp_path):
    (tmp_path / "tasks.yaml").write_text(OWN_TASK % "jsonl")
    # Every row is there twice: what is kept must not be what is trained on.
    lines = [json.dumps({"thing": f"thing {number % 10}", "colour": "r"}) for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))

    def rows(split, **settings):
        tasks = Tasks(declarations=[tmp_path / "tasks.yaml"], **settings)
        return [example.key for example in load_corpus(load_catalogue(tasks)["colour"], split, tasks).examples]

    whole = rows("train")
    assert len(whole) == 20 and rows("validation") == []
    shared = rows("train", validation_share=0.4)
    assert shared == whole[:12]
    kept = rows("validation", validation_share=0.4)
    assert kept == [key for key in whole[12:] if key not in shared] and 0 < len(kept) < 8
    assert rows("validation", rows_per_task=5) == [key for key in whole[5:10] if key not in whole[:5]]
    assert rows("train", rows_per_task=5, validation_share=0.4) == whole[:5]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_users_own_task(tmp_path, kind):
    rows = [{"thing": "blood", "colour": "r"}, {"thing": "grass, fresh", "colour": "g"}]
    write = {
        "csv": lambda path: path.write_text('thing,colour\nblood,r\n"grass, fresh",g\n'),
        "jsonl": lambda path: path.write_text("\n".join(map(json.dumps, rows))),
        "parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path),
    }
    (tmp_path / "tasks.yaml").write_text(OWN_TASK % kind)
    write[kind](tmp_path / f"rows.{kind}")
    settings = Tasks(declarations=[tmp_path / "tasks.yaml"])
    corpus = load_corpus(load_catalogue(settings)["colour"], "train", settings)
    assert {(e.prompt, e.answer) for e in corpus.examples} == {
        ("Name the colour of the thing.\nThing: blood\nAnswer:", "red"),
        ("Name the colour of the thing.\nThing: grass, fresh\nAnswer:", "green"),
    }


def test_damaged_rows_are_counted_with_file_and_line_and_stop_the_job_beyond_the_limit(tmp_path):
    (tmp_path / "tasks.yaml").write_text(OWN_TASK % "jsonl")
    file = tmp_path / "rows.jsonl"
    file.write_bytes(
        b'{"thing": "sky", "colour": "b"}\n'
        b'{"thing": "sky"}\n'
        b'{"thing": "  ", "colour": "b"}\n'
        b'{"thing": "sun", "colour": "y"}\n'
        b'{"thing": "\xff", "colour": "b"}\n'
        b'{"thing": "rose", "colour"\n'
        b'{"thing": "\\ud800", "colour": "r"}\n'
        b'{"colour": "r"}\n'
    )
    settings = Tasks(declarations=[tmp_path / "tasks.yaml"])
    task = load_catalogue(settings)["colour"]
    corpus = load_corpus(task, "train", settings)
    assert [example.answer for example in corpus.examples] == ["blue"]
    assert [(bad.line, bad.reason) for bad in corpus.bad_rows] == [
        (2, "column colour is missing"),
        (3, "thing is empty"),
        (4, "colour is 'y', not one of r, g, b"),
        (5, "thing is not UTF-8 at byte 0"),
        (6, "not JSON: Expecting ':' delimiter at column 27"),
        (7, "a text holds half of a surrogate pair, which is no character"),
        (8, "column thing is missing"),
    ]
    assert all(Path(bad.file).name == "rows.jsonl" for bad in corpus.bad_rows)
    with pytest.raises(
        TooManyBadRows, match=r"more than tasks.bad_row_limit = 2 bad rows, first .*rows.jsonl:2: column colour"
    ):
        load_corpus(task, "train", settings.model_copy(update={"bad_row_limit": 2}))


def test_a_text_or_a_number_is_one_answer_and_no_list_of_options():
    declared = {"name": "own", "family": "mine", "files": {"train": "x"}, "instruction": "Say it.", "text": "{q}"}
    free = Task(**declared, answers="a")
    for value, answers in ((1912, ("1912",)), ("in 1912", ("in 1912",)), (["1912", 1913], ("1912", "1913"))):
        assert free.render({"q": "When?", "a": value}).answers == answers
    assert free.render({"q": "When?", "a": np.array(["1912"])}).answers == ("1912",)
    with pytest.raises(BadRowError, match=r"^a is .*, neither an answer nor a list of them$"):
        free.render({"q": "When?", "a": {"text": ["1912"]}})

    choice = Task(**declared, options=OptionList(list="o"), label="l")
    for value in (["no", "yes"], ("no", "yes"), np.array(["no", "yes"])):
        assert choice.render({"q": "Is it?", "o": value, "l": 1}).options == ("no", "yes")
    for value in ("['no', 'yes']", 12, {"no": 0, "yes": 1}):
        with pytest.raises(BadRowError, match=r"^o is .*, not a list$"):
            choice.render({"q": "Is it?", "o": value, "l": 1})


@pytest.mark.parametrize("text", ["{q:.2f}", "{q.words}", "{q!z}"])
def test_a_row_that_the_text_cannot_be_filled_in_with_is_a_bad_one(text):
    task = Task(name="own", family="mine", files={"train": "x"}, instruction="Say it.", text=text, answers="a")
    with pytest.raises(BadRowError, match=r"^text cannot be filled in: "):
        task.render({"q": "1.5", "a": "yes"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("labels: [r, g, b]", "labels: [r, g]"), "labels has 2 values for 3 options"),
        (("label: colour", "lable: colour"), "colour.lable"),
        (("files: {train: rows.csv}", "hub: some/set"), "name at least one split"),
        (("options: [red, green, blue]", "options: [red]"), "at least two"),
        (("{thing}", "{thing"), r"colour\.text = 'Thing: \{thing': .*a brace that is meant as text is written twice"),
        (("{thing}", "{}"), r"colour\.text = 'Thing: \{\}': .*a field names no column"),
        (("{thing}", "thing}"), r"colour\.text = 'Thing: thing\}': .*a brace that is meant as text is written twice"),
    ],
)
def test_a_wrong_declaration_is_refused_with_its_path(tmp_path, change, said):
    (tmp_path / "tasks.yaml").write_text((OWN_TASK % "csv").replace(*change))
    with pytest.raises(TaskError, match=said):
        load_catalogue(Tasks(declarations=[tmp_path / "tasks.yaml"]))


@pytest.mark.parametrize(
    "value", ["2024-13-45", "!!timestamp soon", "!!bool maybe", "9" * 5000, "[" * 5000, "{a: b", "!!python/name:os.system x"]
)
def test_a_task_file_with_a_value_that_cannot_be_made_is_one_error(tmp_path, value):
    (tmp_path / "tasks.yaml").write_text(OWN_TASK % "csv" + f"  cue: {value}\n")
    with pytest.raises(TaskError, match=r"tasks\.yaml is not YAML: "):
        load_catalogue(Tasks(declarations=[tmp_path / "tasks.yaml"]))


def test_faults_of_sources(tmp_path):
    catalogue = load_catalogue(Tasks())
    with pytest.raises(TaskError, match="Did you mean piqa"):
        catalogue["piqqa"]
    with pytest.raises(TaskError, match="has no folder ybisk/piqa"):
        load_corpus(catalogue["piqa"], "train", Tasks(hub_root=tmp_path))
    with pytest.raises(TaskError, match="declares no train split"):
        load_corpus(catalogue["imdb"], "train", Tasks())


def test_a_folder_in_the_hubs_layout(tmp_path):
    folder = tmp_path / "ybisk" / "piqa"
    (folder / "plain_text").mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: plain_text\n  data_files:\n  - {split: train, path: plain_text/train.jsonl}\n---\n"
    )
    row = {"goal": "Open a door", "sol1": "Push it.", "sol2": "Paint it.", "label": 0}
    (folder / "plain_text" / "train.jsonl").write_text(json.dumps(row) + "\n{broken\n")
    settings = Tasks(hub_root=tmp_path)
    corpus = load_corpus(load_catalogue(settings)["piqa"], "train", settings)
    assert [example.answer for example in corpus.examples] == ["Push it."]
    assert [bad.line for bad in corpus.bad_rows] == [2]


def test_a_data_set_of_the_hub_is_read_by_the_tasks_columns_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # A data set's name is a folder's, where there is one.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "things").mkdir(parents=True)
    settings = Tasks(source="hub", declarations=[tmp_path / "tasks.yaml"])
    declared = (OWN_TASK % "x").replace(
        "files: {train: rows.x}", "hub: own/things\n  config: default\n  splits: {train: train}"
    )
    (tmp_path / "tasks.yaml").write_text(declared)
    beyond = pyarrow.array([0, 2**40], pyarrow.timestamp("s"))

    def write(**columns):
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "own" / "things" / "train.parquet")
        return load_corpus(load_catalogue(settings)["colour"], "train", settings)

    corpus = write(thing=["sky", None], colour=["b", "r"], seen=beyond)
    assert [example.answer for example in corpus.examples] == ["blue"]
    assert [(bad.line, bad.reason) for bad in corpus.bad_rows] == [(2, "column thing is missing")]
    with pytest.raises(TaskError, match="cannot read row 2 of own/things from the hub: "):
        write(thing=beyond, colour=["b", "r"])


def test_a_folder_whose_readme_is_damaged_is_one_error(tmp_path):
    folder = tmp_path / "ybisk" / "piqa"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nconfigs: [\n---\n")
    (folder / "train.jsonl").write_text("{}\n")
    with pytest.raises(TaskError, match="ybisk/piqa"):
        load_corpus(load_catalogue(Tasks())["piqa"], "train", Tasks(hub_root=tmp_path))
