"""The loss on the answers."""

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from lorafleet.training.rows import IGNORED, TokenBatch, TokenRow, pad


def summed_answer_loss(model: torch.nn.Module, batch: TokenBatch) -> torch.Tensor:
    """The cross-entropy of the answers' tokens, summed: a float32 scalar.

    Logits are computed for the columns alone in front of an answer's token: over a large vocabulary they would
    otherwise be the most expensive layer. Batches hold rows of like length, so those columns are few.
    """
    logits = model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=batch.columns).logits
    if logits.shape[1] != len(batch.columns):
        # unsloth's models give all columns.
        logits = logits[:, batch.columns]
    return cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def mean_answer_loss(
    model: torch.nn.Module, rows: Sequence[TokenRow], pad_id: int, device: torch.device, batch: int
) -> float:
    """The mean loss per answer token over `rows`, in evaluation mode; the model's mode is left as it was."""
    training = model.training
    model.eval()
    ordered = sorted(rows, key=len)
    total = torch.zeros((), device=device)
    for start in range(0, len(ordered), batch):
        total += summed_answer_loss(model, pad(ordered[start : start + batch], pad_id).to(device))
    model.train(training)
    return float(total) / sum(len(row.answer) for row in rows)
