"""A router that has learned from the index which task a text belongs to: multinomial logistic regression on embeddings."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
STEPS = 300


@dataclass(frozen=True)
class Router:
    """What it has learned; good for embeddings of the same encoder alone.

    Attributes:
        tasks: their names.
        weights: float32 [tasks, dimensions].
        biases: float32 [tasks].
    """

    tasks: tuple[str, ...]
    weights: Vectors
    biases: Vectors

    def probabilities(self, embedding: npt.ArrayLike, among: Collection[str] | None = None) -> dict[str, float]:
        """How likely each task is, the likeliest first; they sum to 1 over the tasks that count.

        Args:
            embedding: [dimensions].
            among: only these tasks count; all that the router knows where absent.
        """
        places = [place for place, task in enumerate(self.tasks) if among is None or task in among]
        if not places:
            return {}
        logits = (self.weights[places] @ np.asarray(embedding, np.float32) + self.biases[places]).astype(np.float64)
        masses = np.exp(logits - logits.max())
        likely = {self.tasks[place]: float(mass) for place, mass in zip(places, masses / masses.sum(), strict=True)}
        return dict(sorted(likely.items(), key=lambda item: (-item[1], item[0])))


def train_router(embeddings: Vectors, tasks: Sequence[str], strength: float = 50.0) -> Router:
    """Learn which task each row belongs to; tasks count alike, however many rows they have.

    Args:
        embeddings: float32 [rows, dimensions].
        tasks: of each row; two different ones at least.
        strength: how much a fit counts against small weights (scikit-learn's `C`).
    """
    from sklearn.linear_model import LogisticRegression

    learned = LogisticRegression(C=strength, max_iter=STEPS, class_weight="balanced").fit(embeddings, list(tasks))
    weights, biases = learned.coef_.astype(np.float32), learned.intercept_.astype(np.float32)
    if len(learned.classes_) == 2:
        # Of two classes scikit-learn keeps the second's alone.
        weights, biases = np.concatenate([-weights, weights]) / 2, np.concatenate([-biases, biases]) / 2
    return Router(tuple(map(str, learned.classes_)), weights, biases)
