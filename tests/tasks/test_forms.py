"""Which texts a row is embedded as."""

from collections import Counter

import pytest

from lorafleet.config import Index, load_settings
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
