"""An encoder tuned to tell tasks apart: by contrast, by a linear map in closed form, or by the one after the other.

Both learn from rows of which each has its text in several forms. Forms vary within a task, so that the tuned encoder makes
less of them: a bare query comes nearer to rows of its task that were embedded with their instruction.
"""

import random
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lorafleet.config import Models, Tuning
from lorafleet.errors import TrainingError
from lorafleet.models import load_encoder

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense

WARMUP_SHARE = 0.1
LONGEST_GRADIENT = 1.0
WEIGHT_DECAY = 0.01

Tuned = Generator[str, None, "SentenceTransformer"]
"""Yields what each step was done with, and returns the encoder."""
Rows = Mapping[str, Sequence[Sequence[str]]]
"""Of each task, the texts of each row: the same forms in the same order."""


def tuned_encoder(models: Models, tuning: Tuning, rows: Rows, batch: int) -> Tuned:
    """Tune the encoder of the settings, in as many steps as `steps_of` says.

    Args:
        batch: how many texts are embedded at once.

    Raises:
        ModelError: the encoder cannot be loaded.
        TrainingError: fewer than two tasks have two rows.
    """
    few = [task for task, of_task in rows.items() if len(of_task) < 2]
    if few or len(rows) < 2:
        raise TrainingError(
            f"the encoder cannot be tuned on {len(rows)} tasks ({', '.join(rows)}), {len(few)} of them with one row",
            "It takes two tasks with two rows: change tasks.names or tasks.rows_per_task",
        )
    encoder = load_encoder(models)
    if tuning.recipe != "whiten":
        yield from _contrast(encoder, tuning, rows)
    if tuning.recipe != "contrast":
        encoder = yield from _whiten(encoder, tuning, rows, batch)
    return encoder


def steps_of(tuning: Tuning, rows: Rows) -> int:
    """How many steps a tuning takes: those of the training, and tasks that are embedded."""
    return tuning.steps * (tuning.recipe != "whiten") + len(rows) * (tuning.recipe != "contrast")


def _whiten(encoder: "SentenceTransformer", tuning: Tuning, rows: Rows, batch: int) -> Tuned:
    """Add to the encoder the map that whitens its vectors within the tasks, and scale them to length 1 again."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    embedded = []
    for task, of_task in rows.items():
        texts = [text for texts in of_task for text in texts]
        embedded.append(encoder.encode(texts, batch_size=batch, normalize_embeddings=True, show_progress_bar=False))
        yield task
    weight, bias = whitening(embedded, tuning.shrinkage)
    return SentenceTransformer(modules=[*encoder, _dense(weight, bias), Normalize()], device=str(encoder.device))


def whitening(
    embedded: Sequence[npt.NDArray[np.float32]], shrinkage: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The linear map after which vectors vary alike in all directions within a task (as in linear discriminant analysis).

    Tasks count alike, however many vectors they have.

    Args:
        embedded: of each task, float32 [texts, dimensions].
        shrinkage: how much of the covariance is replaced by that of vectors that vary alike in all directions, 0 to 1.

    Returns:
        weight [dimensions, dimensions] and bias [dimensions] of `weight @ vector + bias`; the mean of the tasks' means
        becomes 0.
    """
    centre = np.stack([vectors.mean(axis=0, dtype=np.float64) for vectors in embedded]).mean(axis=0)
    within = np.mean([np.cov(vectors.astype(np.float64).T, bias=True) for vectors in embedded], axis=0)
    dimensions = len(centre)
    within = (1 - shrinkage) * within + shrinkage * np.trace(within) / dimensions * np.eye(dimensions)
    variances, directions = np.linalg.eigh(within)
    weight = (directions / np.sqrt(variances)) @ directions.T
    return weight.astype(np.float32), (-weight @ centre).astype(np.float32)


def _dense(weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32]) -> "Dense":
    import torch
    from sentence_transformers.sentence_transformer.modules import Dense

    width = len(bias)
    return Dense(
        width, width, activation_function=None, init_weight=torch.from_numpy(weight), init_bias=torch.from_numpy(bias)
    )


def _contrast(encoder: "SentenceTransformer", tuning: Tuning, rows: Rows) -> Iterator[str]:
    """Train all of the encoder: of two rows of every task each is to find the other (LoraRetriever, arXiv 2402.09997)."""
    import torch
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import get_linear_schedule_with_warmup

    torch.manual_seed(tuning.seed)
    draws = random.Random(tuning.seed)
    longest, encoder.max_seq_length = encoder.max_seq_length, tuning.max_tokens
    loss = MultipleNegativesRankingLoss(
        encoder,
        scale=1 / tuning.temperature,
        directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
    )
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=tuning.learning_rate, weight_decay=WEIGHT_DECAY)
    warmup = int(WARMUP_SHARE * tuning.steps)
    schedule = get_linear_schedule_with_warmup(optimiser, warmup, tuning.steps)  # type: ignore[no-untyped-call]
    encoder.train()
    for _ in range(tuning.steps):
        pairs = [draws.sample(of_task, 2) for of_task in rows.values()]
        sides = [[draws.choice(pair[side]) for pair in pairs] for side in (0, 1)]
        lost: torch.Tensor = loss([_features(encoder, side) for side in sides], None)
        optimiser.zero_grad()
        lost.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), LONGEST_GRADIENT)
        optimiser.step()
        schedule.step()
        yield f"loss {lost.item():.2f}"
    encoder.eval()
    encoder.max_seq_length = longest


def _features(encoder: "SentenceTransformer", texts: Sequence[str]) -> "dict[str, torch.Tensor]":
    from sentence_transformers.util import batch_to_device

    features: dict[str, torch.Tensor] = batch_to_device(encoder.preprocess(list(texts)), encoder.device)
    return features
