"""Values of columns: what is missing, what is a text, and what a label means."""

import datetime
from decimal import Decimal

import numpy as np
import pytest

from lorafleet.tasks import Task
from lorafleet.tasks.task import OptionColumns
from lorafleet.tasks.values import BadRowError, named

DECLARED = {"name": "own", "family": "mine", "files": {"train": "x"}, "instruction": "Say it."}
NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "known", "name"),
    [
        (1, ["0", "1", "2"], "1"),
        (1.0, ["0", "1", "2"], "1"),
        (np.float32(1), ["0", "1", "2"], "1"),
        (Decimal("1.00"), ["0", "1", "2"], "1"),
        (" 1.0 ", ["0", "1", "2"], "1"),
        ("1.0", ["1", "1.0"], "1.0"),
        (b"wild", ["tame", "wild"], "wild"),
        (True, ["0", "1"], "1"),
        (np.bool_(False), ["0", "1"], "0"),
        ("False", ["0", "1"], "0"),
        (True, ["False", "True"], "True"),
        ("TRUE", ["true", "false", "unknown"], "true"),
    ],
)
def test_what_a_label_means(value, known, name):
    assert named(value, "kind", known) == name


@pytest.mark.parametrize("value", [True, "true", 0.5, "1.5", -1.0, "wild"])
def test_a_label_that_means_none_or_one_of_several_is_refused(value):
    with pytest.raises(BadRowError, match=rf"^kind is {str(value)!r}, not one of 0, 1, 2$"):
        named(value, "kind", ["0", "1", "2"])


def test_the_columns_of_a_task_are_all_that_it_reads():
    task = Task(
        **DECLARED,
        text="{a} {b[x]} {c:{d}} {e.f!r} {{g}}",
        words={"h": {"1": "one"}},
        options=OptionColumns(columns=["i", "j.k"]),
        label="l.m",
    )
    assert task.columns == set("abcdehijl")
    assert Task(**DECLARED, text="{a}", answers="n.o").columns == {"a", "n"}


def test_what_is_missing_is_no_answer_and_a_boolean_is_no_text():
    task = Task(**DECLARED, text="{q}", answers="a")
    assert task.render({"q": "When?", "a": [None, 1912, NAN, " ", b"1913"]}).answers == ("1912", "1913")
    for answers, said in (
        ([None, NAN], "a holds no answer"),
        (NAN, "column a is missing"),
        ([True], "a is the boolean true, not a text"),
        ([["1912"]], "a is ['1912'], not a text"),
        (b"\xff", "a is not UTF-8 at byte 0"),
    ):
        with pytest.raises(BadRowError) as error:
            task.render({"q": "When?", "a": answers})
        assert str(error.value) == said

    choice = Task(**DECLARED, text="{q}", options=OptionColumns(columns=["o", "p"]), label="l")
    for option, said in ((NAN, "column p is missing"), (False, "p is the boolean false, not a text"), (" ", "an option is")):
        with pytest.raises(BadRowError, match=f"^{said}"):
            choice.render({"q": "Is it?", "o": "yes", "p": option, "l": 0})


@pytest.mark.parametrize(
    ("text", "column", "filled"),
    [
        ("{c}", b" caf\xc3\xa9 ", "café"),
        ("{c:.2f}", 1.5, "1.50"),
        ("{c:%Y}", datetime.date(1912, 4, 15), "1912"),
        ("{c[x][0]}", {"x": [3]}, "3"),
    ],
)
def test_a_field_is_filled_in_with_what_a_text_can_hold(text, column, filled):
    example = Task(**DECLARED, text=text, answers="a").render({"c": column, "a": "yes"})
    assert example.key == f"Say it.\n{filled}"


@pytest.mark.parametrize(
    ("text", "column", "said"),
    [
        ("{c[x]}", {"x": NAN}, r"column c\[x\] is missing"),
        ("{c[x]}", {"y": 1}, r"column c\[x\] is missing"),
        ("{c[x]}", "word", r"column c\[x\] is missing"),
        ("{c[x]}", {"x": " "}, r"c\[x\] is empty"),
        ("{c}", {"x": 1}, "c is .*, not a text"),
        ("{c}", np.array([1.5]), "c is .*, not a text"),
        ("{c!s}", True, "c is the boolean true, not a text"),
        pytest.param("{c}", 10**5000, "text cannot be filled in: Exceeds the limit", id="digits"),
    ],
)
def test_a_field_is_not_filled_in_with_what_it_cannot(text, column, said):
    with pytest.raises(BadRowError, match=f"^{said}"):
        Task(**DECLARED, text=text, answers="a").render({"c": column, "a": "yes"})
