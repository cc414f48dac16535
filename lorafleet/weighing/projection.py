"""The sparse projection of a query onto prototypes (arXiv 2410.09908, section 3)."""

import numpy as np
import numpy.typing as npt
from scipy.optimize import LinearConstraint, minimize

Vector = npt.NDArray[np.float64]
TINY = 1e-7
"""A weight below is none."""
STEPS = 500


def project(query: npt.ArrayLike, prototypes: npt.ArrayLike, penalty: float = 1.0) -> Vector:
    """The weights `w` that sum to 1 and make `|query - w @ prototypes|^2 + penalty * |w|_1` least.

    A weight may be negative; the penalty makes that dear, and at 0 leaves the affine projection. The solver's weights are
    made exact afterwards, by solving the conditions of the optimum for those that are not 0.

    Args:
        query: [dimensions].
        prototypes: [tasks, dimensions].

    Returns:
        float64 [tasks].
    """
    rows, wanted = np.asarray(prototypes, np.float64), np.asarray(query, np.float64)
    count = len(rows)
    gram, near = rows @ rows.T, rows @ wanted

    def loss(halves: Vector) -> float:
        weights = halves[:count] - halves[count:]
        return float(weights @ gram @ weights - 2 * near @ weights + penalty * halves.sum())

    def slope(halves: Vector) -> Vector:
        smooth = 2 * (gram @ (halves[:count] - halves[count:]) - near)
        return np.concatenate([smooth + penalty, penalty - smooth])

    # In halves of either sign |w|_1 is a sum, and the whole a quadratic programme.
    signs = np.concatenate([np.ones(count), -np.ones(count)])
    found = minimize(
        loss,
        np.concatenate([np.full(count, 1 / count), np.zeros(count)]),
        jac=slope,
        method="SLSQP",
        bounds=[(0, None)] * (2 * count),
        constraints=LinearConstraint(signs, 1, 1),
        options={"maxiter": STEPS, "ftol": 1e-12},
    )
    weights = found.x[:count] - found.x[count:]
    return _exact(weights, gram, near, penalty)


def _exact(weights: Vector, gram: Vector, near: Vector, penalty: float) -> Vector:
    """The optimum among weights of these signs; these weights, where its signs are others."""
    kept = np.flatnonzero(np.abs(weights) > TINY)
    signs = np.sign(weights[kept])
    ones = np.ones((len(kept), 1))
    system = np.block([[2 * gram[np.ix_(kept, kept)], ones], [ones.T, np.zeros((1, 1))]])
    solved = np.linalg.lstsq(system, np.concatenate([2 * near[kept] - penalty * signs, [1.0]]))[0][:-1]
    exact = np.zeros_like(weights)
    exact[kept] = solved if np.array_equal(np.sign(solved), signs) else weights[kept]
    return exact
