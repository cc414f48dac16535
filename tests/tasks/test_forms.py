"""Which texts a row is embedded as."""

from collections import Counter

import pytest

from lorafleet.config import Index, Tasks, load_settings
from lorafleet.tasks import formless, load_catalogue, load_corpus, texts_in_forms, texts_to_embed


@pytest.fixture(scope="module")
def corpus():
    """The rows of CommonsenseQA in the sample pack."""
    settings = load_settings().tasks
    return load_corpus(load_catalogue(settings)["commonsense_qa"], "train", settings)


def test_a_row_is_embedded_in_all_forms_or_in_one_that_its_key_draws(corpus):
    every = Index(forms=("instruction", "fields", "bare"), pooling="mean")
    often_bare = Index()
    drawn = Counter()
    for example in corpus.examples:
        texts = texts_in_forms(corpus.task, example, ("instruction", "fields", "bare"))
        assert len(set(texts)) == 3
        assert texts_to_embed(corpus.task, example, every) == texts
        (one,) = texts_to_embed(corpus.task, example, often_bare)
        assert texts_to_embed(corpus.task, example, often_bare) == (one,)
        drawn[texts.index(one)] += 1
    shares = [drawn[form] / len(corpus.examples) for form in range(3)]
    assert shares == pytest.approx([0.2, 0.2, 0.6], abs=0.15)
    assert formless("a", every) == ("a",) * 3 and formless("a", often_bare) == ("a",)
    assert every.embedded != often_bare.embedded


def test_a_text_that_is_written_as_a_block_or_holds_braces_has_a_bare_form(tmp_path):
    (tmp_path / "tasks.yaml").write_text(
        "animals:\n  family: mine\n  files: {train: rows.csv}\n  instruction: Say where it lives.\n"
        "  text: |\n    Animal: {animal}\n    Age: {age} {{years}}\n  answers: place\n"
    )
    task = load_catalogue(Tasks(declarations=[tmp_path / "tasks.yaml"]))["animals"]
    example = task.render({"animal": "fox", "age": "old", "place": "wood"})
    assert texts_in_forms(task, example, ("fields", "bare")) == (
        "Animal: fox\nAge: old {years}",
        "fox\nold {years}",
    )
