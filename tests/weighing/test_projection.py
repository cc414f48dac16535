"""The sparse projection against cases solved by hand, and against the conditions that only an optimum fulfils."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafleet.weighing.projection import project

EXACT = 1e-5


def cost(weights, query, prototypes, penalty):
    return np.square(query - weights @ prototypes).sum() + penalty * np.abs(weights).sum()


@pytest.mark.parametrize(
    ("query", "prototypes", "penalty", "weights"),
    [
        ([0.25, 0.75], [[1, 0], [0, 1]], 0.0, [0.25, 0.75]),
        ([5, 0], [[1, 0], [0, 1]], 1.0, [2.5, -1.5]),
        ([5, 0], [[1, 0], [0, 1]], 100.0, [1, 0]),
        ([2, 0], [[1, 0], [0, 0]], 0.0, [2, -1]),
        ([2, 0], [[1, 0], [0, 0]], 0.5, [1.5, -0.5]),
        ([9, 9], [[1, 0]], 1.0, [1]),
    ],
    ids=["inside", "outside", "dear", "a line", "a line, dearer", "one prototype"],
)
def test_cases_solved_by_hand(query, prototypes, penalty, weights):
    assert project(query, prototypes, penalty) == pytest.approx(weights, abs=EXACT)


@settings(deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 22),
    st.integers(2, 64),
    st.sampled_from([0.0, 0.01, 0.1, 1.0, 10.0]),
)
def test_the_weights_fulfil_the_conditions_of_the_optimum(seed, tasks, dimensions, penalty):
    draws = np.random.default_rng(seed)
    prototypes = draws.standard_normal((tasks, dimensions))
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    query = draws.standard_normal(dimensions)
    query /= np.linalg.norm(query)
    weights = project(query, prototypes, penalty)
    assert weights.sum() == pytest.approx(1, abs=EXACT)
    slope = 2 * prototypes @ (weights @ prototypes - query)
    used = weights != 0
    # The multiplier of the sum is the same for every weight that is not 0, and the penalty holds the others there.
    multipliers = -(slope + penalty * np.sign(weights))[used]
    assert multipliers == pytest.approx(np.full(used.sum(), multipliers.mean()), rel=EXACT, abs=EXACT)
    assert (np.abs(slope[~used] + multipliers.mean()) <= penalty + EXACT * (1 + penalty)).all()
    other = draws.dirichlet(np.ones(tasks))
    assert cost(weights, query, prototypes, penalty) <= cost(other, query, prototypes, penalty) + EXACT
