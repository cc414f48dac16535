"""How the next tokens of a batch are chosen: the same token for a seed, whatever else is in the batch."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

COLDEST = 1e-6
"""The likeliest token has all the mass there; at temperatures far below, float32 would overflow."""
OFTEN_ENOUGH = 512
"""So many tokens hold most nuclei."""
SPLITMIX_STEP = 0x9E3779B97F4A7C15 - 2**64
SPLITMIX_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
"""The generator's constants, as int64."""


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
    """One draw a row by the Gumbel-max trick: the likeliest token once every token has noise of its own.

    In a larger or smaller batch logits are rounded differently. That changes the draw only where the two best tokens are as
    near to each other as the rounding; the inverse of the distribution function would add up that of the whole vocabulary.
    """

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=logits.device, dtype=torch.float32)[:, None]

    logits = logits / column([max(draw.temperature, COLDEST) for draw in draws])
    cut = [row for row, draw in enumerate(draws) if draw.top_p < 1]
    if cut:
        places = torch.tensor(cut, device=logits.device)
        logits[places] = _nucleus(logits[places], column([draws[row].top_p for row in cut]))
    seeds = torch.tensor([draw.source.getrandbits(63) for draw in draws], device=logits.device)
    return logits.double().sub_(_exponential(seeds, logits.shape[-1]).log_()).argmax(dim=-1)


def _exponential(seeds: torch.Tensor, count: int) -> torch.Tensor:
    """Draws of the exponential distribution, float64 [seeds, count]: each depends on its seed and its place alone.

    They are SplitMix64's (Steele, Lea, Flood 2014), which can be computed side by side, and are the same on every device.
    """
    places = torch.arange(1, count + 1, device=seeds.device)
    bits = seeds[:, None] + places * SPLITMIX_STEP
    for shift, factor in SPLITMIX_ROUNDS:
        bits = bits.bitwise_xor_(_shifted(bits, shift)).mul_(factor)
    bits = bits.bitwise_xor_(_shifted(bits, 31))
    uniform = _shifted(bits, 11).double().add_(0.5).mul_(2.0**-53)
    return uniform.log_().neg_()


def _shifted(bits: torch.Tensor, shift: int) -> torch.Tensor:
    """Shifted to the right, zeros coming in: torch repeats the sign."""
    return (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _nucleus(logits: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Nothing but the smallest set of tokens with the mass `top_p`."""
    normal = logits.logsumexp(dim=-1, keepdim=True)
    # A GPU sorts a vocabulary sooner than it is asked whether a part would do; a CPU takes 5 ms a row.
    for count in (logits.shape[-1],) if logits.is_cuda else (min(OFTEN_ENOUGH, logits.shape[-1]), logits.shape[-1]):
        values, tokens = logits.topk(count, dim=-1)
        probabilities = (values - normal).exp()
        outside = probabilities.cumsum(dim=-1) - probabilities >= top_p
        if count == logits.shape[-1] or bool(outside[:, -1].all()):
            break
    return torch.full_like(logits, -torch.inf).scatter(1, tokens, values.masked_fill(outside, -torch.inf))
