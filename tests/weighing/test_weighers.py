"""The nucleus: a case by hand, and what must hold for any neighbours."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from pytest import approx

from lorafleet.weighing import nucleus_weights


@dataclass(frozen=True)
class Row:
    task: str
    similarity: float


def test_a_case_by_hand():
    rows = [Row("a", 0.9), Row("b", 0.8), Row("a", 0.7), Row("c", 0.4), Row("b", 0.4), Row("d", -0.5)]
    weights = nucleus_weights(rows, p=0.8)
    # Sums 1.6, 1.2, 0.4 of 3.2: shares 0.5, 0.375, 0.125; the first two reach 0.8.
    assert weights.shares == approx({"a": 0.5, "b": 0.375, "c": 0.125})
    assert dict(weights) == approx({"a": 4 / 7, "b": 3 / 7})
    assert list(weights) == ["a", "b"]
    assert dict(nucleus_weights(rows, p=0.5)) == {"a": 1.0}
    assert dict(nucleus_weights(rows, p=0.8, among={"b", "c"})) == approx({"b": 0.75, "c": 0.25})
    assert dict(nucleus_weights([Row("a", -0.1)], p=0.9)) == {}


@given(
    rows=st.lists(st.builds(Row, st.sampled_from("abcdefg"), st.floats(-1, 1)), max_size=100),
    p=st.floats(0.01, 1),
)
def test_weights_sum_to_one_and_the_nucleus_is_the_smallest(rows, p):
    weights = nucleus_weights(rows, p)
    if not weights:
        assert all(row.similarity <= 0 for row in rows)
        return
    assert sum(weights.values()) == approx(1)
    shares = weights.shares
    assert sum(shares.values()) == approx(1)
    assert list(weights) == list(shares)[: len(weights)], "the heaviest tasks, in order"
    assert sum(shares[task] for task in weights) >= p - 1e-9
    assert sum(shares[task] for task in list(weights)[:-1]) < p
