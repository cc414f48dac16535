"""What an answer is worth, by cases computed by hand; queries of every form; the choice of a scoring."""

import pytest

from lorafleet.config import Tasks
from lorafleet.engine import OptionScore
from lorafleet.evaluation.metrics import best_option, exact_match, f1
from lorafleet.evaluation.queries import query_text
from lorafleet.evaluation.scoring import choose_scoring
from lorafleet.tasks import load_catalogue, load_corpus

YES, LONG, NO = OptionScore("yes", -2.0, 1, 3), OptionScore("no way at all", -4.0, 4, 13), OptionScore("no", -2.5, 2, 2)


def test_options_are_compared_by_sum_token_or_byte():
    assert best_option([YES, LONG, NO], "sum") == 0
    assert best_option([YES, LONG, NO], "token") == 1
    assert best_option([YES, LONG, NO], "byte") == 1
    assert best_option([YES, NO], "token") == 1
    assert best_option([NO, NO], "sum") == 0


def test_exact_match_forgives_case_articles_punctuation_and_blanks():
    assert exact_match(" The  Eiffel Tower. ", ["Louvre", "eiffel tower"])
    assert not exact_match("Eiffel Tower in Paris", ["Eiffel Tower"])
    assert not exact_match("", ["a thing"])


def test_f1_counts_words_as_often_as_they_stand_there():
    # Two of three given words are wanted, and both wanted words are given: 2 * 2 / (3 + 2).
    assert f1("Eiffel Tower Paris", ["the Eiffel Tower"]) == pytest.approx(0.8)
    # "red red" and "red": one in common, not two.
    assert f1("red red", ["red"]) == pytest.approx(2 / 3)
    assert f1("north", ["south", "the North"]) == 1
    assert f1("", ["north"]) == 0


def test_the_scoring_that_training_rows_prefer_is_chosen():
    wants_long = [([YES, LONG], 1)] * 3 + [([YES, LONG], 0)]
    choice = choose_scoring(wants_long, declared="sum")
    assert (choice.chosen, choice.accuracy, choice.rows) == ("token", {"sum": 25.0, "token": 75.0, "byte": 75.0}, 4)
    assert choose_scoring(wants_long, declared="byte").chosen == "byte"
    assert choose_scoring([([YES, LONG], 0)], declared="token").chosen == "sum"
    assert choose_scoring([([YES, NO], 1)] * 100 + [([YES, NO], 0)] * 99, declared="sum").chosen == "sum", "within 1 point"


def test_queries_lose_instruction_and_field_names():
    settings = Tasks(names=["copa", "wic", "boolq", "piqa"])
    catalogue = load_catalogue(settings)
    row = {"premise": "The lamp fell.", "question": "cause", "choice1": "wind", "choice2": "rain", "label": 0}
    copa = catalogue["copa"]
    example = copa.render(row)
    assert query_text(copa, example, "instruction") == example.key
    assert query_text(copa, example, "fields") == query_text(copa, example, "bare") == "The lamp fell. What was the cause?"
    wic = catalogue["wic"]
    example = wic.render({"word": "draw", "sentence1": "Draw: a bow", "sentence2": "draw a card", "label": 0})
    assert query_text(wic, example, "fields") == "Word: draw\nSentence 1: Draw: a bow\nSentence 2: draw a card"
    assert query_text(wic, example, "bare") == "draw\nDraw: a bow\ndraw a card"
    boolq = catalogue["boolq"]
    example = boolq.render({"passage": "Tea is hot.", "question": "is tea hot", "label": 1})
    assert query_text(boolq, example, "bare") == "Tea is hot.\nis tea hot?"


def test_every_row_of_the_sample_pack_has_a_bare_form():
    settings = Tasks()
    for task in load_catalogue(settings).values():
        for example in load_corpus(task, "evaluation", settings).examples:
            bare, fields = query_text(task, example, "bare"), query_text(task, example, "fields")
            assert task.instruction not in fields
            assert bare and (len(bare) < len(fields)) == (": {" in task.text), task.name
