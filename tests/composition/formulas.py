"""What each method adds to one layer's weight, written out in float64 from the formulas, without the house's code."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def outputs_added(a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float], weights: Sequence[float]) -> Tensor:
    """cat: sum_i w_i s_i B_i A_i."""
    parts = zip(a, b, scales, weights, strict=True)
    return torch.stack([weight * scale * (up.double() @ down.double()) for down, up, scale, weight in parts]).sum(dim=0)


def parameters_added(a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float], weights: Sequence[float]) -> Tensor:
    """linear: (sum_j b_j B_j)(sum_i a_i A_i), with b = sqrt|w s| and a = sign(w) b."""
    shares = [weight * scale for weight, scale in zip(weights, scales, strict=True)]
    a_sum = sum(math.copysign(math.sqrt(abs(share)), share) * half.double() for share, half in zip(shares, a, strict=True))
    b_sum = sum(math.sqrt(abs(share)) * half.double() for share, half in zip(shares, b, strict=True))
    return torch.as_tensor(b_sum @ a_sum)


def largest_kept(half: Tensor, density: float) -> Tensor:
    """The int(density * n) values of the largest magnitude; the values' magnitudes are all different."""
    half = half.double()
    kept = int(density * half.numel())
    sizes = half.abs().flatten().sort(descending=True).values
    return half * (half.abs() >= sizes[kept - 1]) if kept else torch.zeros_like(half)


def elected(halves: Sequence[Tensor], majority_sign: str) -> list[Tensor]:
    """Each adapter's values of the elected sign, over the number of adapters that have one there; a draw elects plus."""
    values = torch.stack([half.double() for half in halves])
    votes = values if majority_sign == "total" else values.sign()
    sign = torch.where(votes.sum(dim=0) < 0, -1.0, 1.0).double()
    agrees = values.sign() == sign
    return list(values * agrees / agrees.sum(dim=0).clamp(min=1))


def best_of_rank(whole: Tensor, rank: int) -> Tensor:
    """svd: the nearest matrix of that rank."""
    left, values, right = torch.linalg.svd(whole.double(), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]
