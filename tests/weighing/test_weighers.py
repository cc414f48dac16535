"""The weighers: a case by hand, and what must hold for any neighbours."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx

from lorafleet.weighing import (
    BY_NEIGHBOURS,
    NearestPrototypes,
    Nucleus,
    Softmax,
    SparseProjection,
    TopK,
    Uniform,
    make_weigher,
    settings_of,
    task_shares,
)


@dataclass(frozen=True)
class Row:
    task: str
    similarity: float


ROWS = [Row("a", 0.9), Row("b", 0.8), Row("a", 0.7), Row("c", 0.4), Row("b", 0.4), Row("d", -0.5)]
"""Sums 1.6, 1.2, 0.4 of 3.2: shares 0.5, 0.375, 0.125."""
SIMILARITIES = st.floats(-1, 1, allow_subnormal=False)
NEIGHBOURS = st.lists(st.builds(Row, st.sampled_from("abcdefg"), SIMILARITIES), max_size=100)
EVERYTHING = {"p": 0.3, "k": 2, "temperature": 0.7}
# As far as a request may go.
SETTINGS = st.fixed_dictionaries(
    {
        "p": st.floats(0, 1, exclude_min=True),
        "k": st.integers(1, 1000),
        "temperature": st.floats(0, exclude_min=True, allow_infinity=False),
        "sharpness": st.floats(0, 100, exclude_min=True),
    }
)


@pytest.mark.parametrize(
    ("weigher", "weights"),
    [
        (Nucleus(0.8), {"a": 4 / 7, "b": 3 / 7}),
        (Nucleus(0.5), {"a": 1.0}),
        (Nucleus(1), {"a": 0.5, "b": 0.375, "c": 0.125}),
        (TopK(2), {"a": 4 / 7, "b": 3 / 7}),
        (TopK(9), {"a": 0.5, "b": 0.375, "c": 0.125}),
        (Uniform(2), {"a": 0.5, "b": 0.5}),
        (Softmax(0.125, 2), {"a": math.e / (math.e + 1), "b": 1 / (math.e + 1)}),
        (Softmax(1e-6, 3), {"a": 1.0}),
    ],
)
def test_a_case_by_hand(weigher, weights):
    found = weigher.weigh(ROWS)
    assert dict(found) == approx(weights)
    assert list(found) == list(weights)
    assert found.shares == approx({"a": 0.5, "b": 0.375, "c": 0.125})


def test_only_tasks_with_an_adapter_count():
    assert dict(Nucleus(0.8).weigh(ROWS, among={"b", "c"})) == approx({"b": 0.75, "c": 0.25})
    assert dict(Uniform(3).weigh(ROWS, among={"c", "d"})) == {"c": 1.0}


def test_a_weigher_takes_those_settings_that_it_has():
    made = [make_weigher(name, EVERYTHING) for name in BY_NEIGHBOURS]
    assert made == [Nucleus(0.3), TopK(2), Softmax(0.7, 2), Uniform(2)]
    assert settings_of("softmax") == ("temperature", "k")
    assert make_weigher("nucleus", {}) == Nucleus()
    assert make_weigher("sparse_projection", {**EVERYTHING, "penalty": 2.5}) == SparseProjection(2.5, 2)
    assert make_weigher("prototypes", EVERYTHING) == NearestPrototypes(0.7, 2)


def test_who_is_near_to_nothing_that_counts_has_no_weights():
    for name in BY_NEIGHBOURS:
        asked = {**EVERYTHING, "abstain_below": 0.9}
        weigher, abstaining = make_weigher(name, EVERYTHING), make_weigher(name, asked)
        assert abstaining.weigh(ROWS) == weigher.weigh(ROWS), "0.9 is not below 0.9"
        # Without a the nearest row is 0.8 away.
        left = abstaining.weigh(ROWS, among={"b", "c"})
        assert not left and left.shares == weigher.weigh(ROWS, among={"b", "c"}).shares
        assert not abstaining.weigh([])
        assert make_weigher(name, {**asked, "abstain_below": 0.0}) == weigher


@given(rows=NEIGHBOURS, name=st.sampled_from(sorted(BY_NEIGHBOURS)), settings=SETTINGS)
def test_weights_of_any_weigher_sum_to_one_over_its_heaviest_tasks(rows, name, settings):
    weights = make_weigher(name, settings).weigh(rows)
    if not weights:
        assert all(row.similarity <= 0 for row in rows)
        return
    assert sum(weights.values()) == approx(1) == sum(weights.shares.values())
    assert list(weights) == list(weights.shares)[: len(weights)], "the heaviest tasks, in order"
    values = list(weights.values())
    assert values == sorted(values, reverse=True)
    assert min(values) > 0
    if "k" in settings_of(name):
        assert len(weights) <= settings["k"]


@given(rows=NEIGHBOURS, p=st.floats(0.01, 1))
def test_the_nucleus_is_the_smallest(rows, p):
    weights = Nucleus(p).weigh(rows)
    if weights:
        assert sum(weights.shares[task] for task in weights) >= p - 1e-9
        assert sum(weights.shares[task] for task in list(weights)[:-1]) < p


@given(rows=NEIGHBOURS, factor=st.sampled_from([0.25, 0.5]))
def test_shares_do_not_ask_how_similar_all_are_together(rows, factor):
    fainter = [Row(row.task, row.similarity * factor) for row in rows]
    assert task_shares(fainter) == approx(task_shares(rows))


def test_the_sharper_the_more_the_nearest_rows_count():
    rows = [Row("near", 0.9), *(Row("many", 0.5) for _ in range(3))]
    assert next(iter(make_weigher("nucleus", {"p": 1.0}).weigh(rows))) == "many"
    sharp = make_weigher("nucleus", {"p": 1.0, "sharpness": 4})
    assert next(iter(sharp.weigh(rows))) == "near"
    assert dict(sharp.weigh(rows)) == approx(
        {"near": 0.9**4 / (0.9**4 + 3 * 0.5**4), "many": 1 - 0.9**4 / (0.9**4 + 3 * 0.5**4)}
    )
    # A power that would make nothing of numbers below 1.
    faint = [Row(row.task, row.similarity / 1000) for row in rows]
    assert make_weigher("top_k", {"k": 1, "sharpness": 1000}).weigh(faint) == {"near": 1}
    # How near the nearest row is, `abstain_below` asks of the cosine itself.
    assert make_weigher("nucleus", {"sharpness": 4, "abstain_below": 0.8}).weigh(rows)
