"""Products on CPUs, of weights that oneDNN has laid out for itself."""

import torch
from torch import nn
from torch.nn.functional import pad

PACKED_FOR_ROWS = 16
STEPS = 8
"""oneDNN compiles a product for every number of rows that it meets, and keeps it. So only 16 times some number comes, and
between one power of two and the next only so many."""


class PackedLinear:
    """What `torch.nn.functional.linear` gives, from a copy of the weight in oneDNN's own layout.

    On CPUs that is 1.3 to 3.5 times as fast, for few rows most; torch's own compiler does the same.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs]."""
        rows = x.flatten(0, -2)
        count = len(rows)
        padded = padded_rows(count)
        if padded > count:
            # Otherwise passes of 1 to 512 tokens leave a gigabyte of compiled products behind.
            rows = pad(rows, (0, 0, 0, padded - count))
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return y[:count].view(*x.shape[:-1], y.shape[-1])


def padded_rows(count: int) -> int:
    """How many rows are multiplied for so many: as many up to 16, then up to an eighth more."""
    if count <= PACKED_FOR_ROWS:
        return count
    step = max(PACKED_FOR_ROWS, (1 << (count - 1).bit_length()) // (2 * STEPS))
    return -(-count // step) * step


class _Packed(nn.Module):
    """Takes the place of a linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach()
        self._product = PackedLinear(linear.weight.detach(), bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x)


def pack_linears(model: nn.Module) -> None:
    """Let a model compute its linear layers from packed weights, where oneDNN can lay them out. For inference alone."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and packs(child.weight):
                setattr(module, name, _Packed(child))


def packs(weight: torch.Tensor) -> bool:
    """Whether oneDNN can lay a weight out here."""
    there = (
        weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
    if there and weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return there and weight.dtype == torch.float32
