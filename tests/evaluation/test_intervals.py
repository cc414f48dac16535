"""The bootstrap on data whose answer is known."""

import numpy as np
import pytest

from lorafleet.evaluation.intervals import Bootstrap


def scores(right: int, of: int) -> np.ndarray:
    return np.array([100.0] * right + [0.0] * (of - right))


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation():
    found = Bootstrap(4000).mean({"one": scores(60, 200)})
    deviation = 100 * (0.3 * 0.7 / 200) ** 0.5
    assert found.value == pytest.approx(30)
    assert found.low == pytest.approx(30 - 1.96 * deviation, abs=0.6)
    assert found.high == pytest.approx(30 + 1.96 * deviation, abs=0.6)


def test_every_task_counts_the_same_and_rows_are_drawn_within_their_task():
    found = Bootstrap().mean({"large": scores(400, 400), "small": scores(0, 4)})
    assert (found.value, found.low, found.high) == (50, 50, 50)


def test_differences_are_paired():
    one = scores(50, 100)
    better = one.copy()
    better[-10:] = 100
    bootstrap = Bootstrap(4000)
    paired = bootstrap.difference({"task": better}, {"task": one})
    # 10 rows of 100 are better and none is worse: how many are drawn is binomial. Unpaired, 0 would be within.
    assert (paired.value, paired.low, paired.high) == (10, 5, 16)
    assert paired.certain
    same = bootstrap.difference({"task": one}, {"task": one})
    assert (same.low, same.high) == (0, 0) and not same.certain
    share = bootstrap.ratio({"task": better}, {"task": one})
    assert share is not None and share.value == pytest.approx(120) and share.low > 105
    assert bootstrap.ratio({"task": one}, {"task": scores(0, 100)}) is None


def test_draws_hang_on_the_seed_and_the_task_alone():
    first, again = Bootstrap(seed=3), Bootstrap(seed=3)
    again.mean({"other": scores(1, 7)})
    assert first.mean({"task": scores(9, 20)}) == again.mean({"task": scores(9, 20)})
    assert first.mean({"task": scores(9, 20)}) != Bootstrap(seed=4).mean({"task": scores(9, 20)})
