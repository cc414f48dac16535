"""LoraHub: weights of adapters for a task, searched for on a few of its rows without a gradient (arXiv 2307.13269)."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from lorafleet.composition import Composition
from lorafleet.config import Settings
from lorafleet.engine import ScoreRequest
from lorafleet.errors import LoRAFleetError
from lorafleet.evaluation.averaging import averaged
from lorafleet.evaluation.bench import Bench, Rows
from lorafleet.evaluation.soup import adapters_like
from lorafleet.tasks import Example

SEARCH_PACKAGE = "cma"
MOST_ADAPTERS = 20
SHOTS = 5
BOUND = 1.5
"""Of a weight's absolute value."""
PENALTY = 0.05
"""Of the sum of the weights' absolute values."""
FIRST_STEP = 0.3
POPULATION, GENERATIONS = 16, 25
Vector = npt.NDArray[np.float64]


def lorahub(bench: Bench, rows: Rows, settings: Settings) -> list[Composition]:
    """The weights under which the right answers to the task's last training rows are likeliest, for all rows of the task.

    With the own adapter masked these rows are still used: to see a few of a new task is this method's protocol, and what it
    has ahead of the others. It draws its adapters from a larger hub; here they are those most like the task.

    Raises:
        LoRAFleetError: the package `cma` is missing.
    """
    tasks = adapters_like(bench, rows.task, MOST_ADAPTERS, rows.masked)
    shots = bench.corpus(rows.task.name, "train").examples[-SHOTS:]

    def compositions(candidates: Sequence[Vector]) -> list[Composition]:
        return [averaged(bench, dict(zip(tasks, map(float, one), strict=True)), settings) for one in candidates]

    def losses(candidates: Sequence[Vector]) -> list[float]:
        surprises = _surprises(bench, shots, compositions(candidates))
        pairs = zip(surprises, candidates, strict=True)
        return [surprise + PENALTY * float(np.abs(candidate).sum()) for surprise, candidate in pairs]

    return compositions([search(losses, len(tasks), settings.evaluation.seed)]) * len(rows.examples)


def search(losses: Callable[[Sequence[Vector]], Sequence[float]], size: int, seed: int) -> Vector:
    """The best weights that an evolution strategy (CMA-ES) finds, beginning where all are 0: float64 [size].

    Args:
        losses: of a whole generation of candidates, so that they can be computed in one batch.
    """
    try:
        with warnings.catch_warnings():
            # It misses what it would draw plots with.
            warnings.simplefilter("ignore", UserWarning)
            import cma
    except ImportError:
        raise LoRAFleetError(f"lorahub needs the package {SEARCH_PACKAGE}", "pip install 'lorafleet[search]'") from None
    options = {"bounds": [-BOUND, BOUND], "popsize": POPULATION, "maxiter": GENERATIONS, "seed": seed + 1, "verbose": -9}
    strategy = cma.CMAEvolutionStrategy(np.zeros(size), FIRST_STEP, options)
    while not strategy.stop():
        candidates = strategy.ask()
        strategy.tell(candidates, losses(candidates))
    return np.asarray(strategy.result.xbest, np.float64)


def _surprises(bench: Bench, shots: Sequence[Example], compositions: Sequence[Composition]) -> list[float]:
    """Of each composition the loss that it would be trained by: nats a token of the right answer, the mean of the rows."""
    asked = [ScoreRequest(shot.prompt, (shot.answer,), one) for one in compositions for shot in shots]
    found = [-score.by("token") for (score,) in bench.engine.score(asked)]
    return [float(mean) for mean in np.reshape(found, (len(compositions), len(shots))).mean(axis=1)]
