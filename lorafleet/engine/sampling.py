"""How the next tokens of a batch are chosen: the same token for a seed, whatever else is in the batch."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

COLDEST = 1e-6
"""The likeliest token has all the mass there; at temperatures far below, float32 would overflow."""


@dataclass(frozen=True)
class Draw:
    """How one row chooses: the likeliest token at temperature 0, drawn by `source` above it."""

    temperature: float
    top_p: float
    source: random.Random


@dataclass(frozen=True)
class Chosen:
    """The next tokens of a batch.

    Attributes:
        tokens: one a row.
        log_probabilities: of each under the model, at temperature 1.
        likeliest: of each row, the likeliest tokens with their log-probabilities, as many as the widest row wants.
    """

    tokens: list[int]
    log_probabilities: list[float]
    likeliest: list[list[tuple[int, float]]]


class Choosing:
    """A choice that is under way on the device.

    To read it waits for it and for what was launched before, not for what comes after.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = [_on_its_way(tensor) for tensor in tensors]
        self._done: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def read(self) -> Chosen:
        """The choice, once it is there."""
        if self._done is not None:
            self._done.synchronize()
        tokens, log_probabilities, ids, values = (tensor.tolist() for tensor in self._tensors)
        likeliest = [list(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]
        return Chosen(tokens, log_probabilities, likeliest)


def choose(logits: torch.Tensor, draws: Sequence[Draw], likeliest: int = 0) -> Choosing:
    """Begin to choose the next token of each row.

    Args:
        logits: float32 [rows, vocabulary].
        likeliest: how many of the likeliest tokens to tell.
    """
    tokens = logits.argmax(dim=-1)
    drawn = [row for row, draw in enumerate(draws) if draw.temperature > 0]
    if drawn:
        places = torch.tensor(drawn, device=logits.device)
        tokens[places] = _draw(logits[places], [draws[row] for row in drawn])
    return tell(logits, tokens, likeliest)


def tell(logits: torch.Tensor, tokens: torch.Tensor, likeliest: int = 0) -> Choosing:
    """Begin to tell of a token in each row that it was chosen.

    Args:
        tokens: int64 [rows].
    """
    normal = logits.logsumexp(dim=-1)
    log_probabilities = logits.gather(1, tokens[:, None])[:, 0] - normal
    values, ids = logits.topk(likeliest, dim=-1)
    return Choosing((tokens, log_probabilities, ids, values - normal[:, None]))


def _on_its_way(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU; from a GPU it comes into pinned memory, beside what is computed next."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _draw(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """One draw a row by the inverse of the distribution function.

    The tokens stand in the order of their ids: in that of their probabilities, tokens of nearly equal ones would change
    places with the rounding of a larger or smaller batch, and a seed would not repeat its draws.
    """

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=logits.device, dtype=torch.float32)[:, None]

    probabilities = (logits / column([max(draw.temperature, COLDEST) for draw in draws])).softmax(dim=-1)
    cut = [row for row, draw in enumerate(draws) if draw.top_p < 1]
    if cut:
        places = torch.tensor(cut, device=logits.device)
        probabilities[places] = _nucleus(probabilities[places], column([draws[row].top_p for row in cut]))
    # In float32 the sums of a whole vocabulary are wrong by more than what another batch does to the logits.
    mass = probabilities.cumsum(dim=-1, dtype=torch.float64)
    aim = torch.tensor([draw.source.random() for draw in draws], dtype=torch.float64, device=logits.device)
    aim = aim[:, None] * mass[:, -1:]
    # Rounding may carry the aim up to the whole mass, behind the last token that has any.
    last = (probabilities > 0).long().cumsum(dim=-1).argmax(dim=-1, keepdim=True)
    return torch.searchsorted(mass, aim, right=True).minimum(last)[:, 0]


def _nucleus(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Nothing but the smallest set of tokens with the mass `top_p`."""
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    outside = ordered.cumsum(dim=-1) - ordered >= top_p
    return probabilities.masked_fill(torch.zeros_like(outside).scatter(1, tokens, outside), 0)
