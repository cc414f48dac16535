"""The composed adapters' part of a layer group's output, in plain torch."""

import torch

from lorafleet.composition.groups import LayerGroup
from lorafleet.composition.pages import PageTensors
from lorafleet.composition.plan import Block, Plan


def add_composed_(y: torch.Tensor, x: torch.Tensor, group: LayerGroup, tensors: PageTensors, plan: Plan) -> None:
    """Add what the adapters give, in place.

    A stands on the left of its product, B on the right: of each the faster way round with the BLAS libraries that torch
    brings along, for few tokens by half and more.

    Args:
        y: the group's output, the modules' side by side, [tokens, outputs].
        x: its input, [tokens, inputs].
    """
    for block in plan.blocks:
        a, b = tensors.a[block.pages], tensors.b[block.pages]
        pages, modules = a.shape[0], len(group.modules)
        down = (a.flatten(0, 1) @ x[block.tokens].T).view(pages, modules, b.shape[1], -1)
        if block.unused is not None:
            # A coefficient of 0 would not do: a product that overflowed in a neighbour's adapter times 0 is NaN.
            down.masked_fill_(block.unused[:, None, None], 0)
        mixed = _mixed(down, block)
        for place in range(modules):
            columns = slice(group.starts[place], group.starts[place + 1])
            y[block.tokens, columns].addmm_(mixed[:, place].flatten(0, 1).T, b[:, :, columns].flatten(0, 1))


def _mixed(down: torch.Tensor, block: Block) -> torch.Tensor:
    """direct * down + spread * sum of gather * down, the sum over pages of one position: [pages, modules, rank, tokens]."""
    mixed = None if block.direct is None else down * block.direct[:, None, None]
    if block.gather is not None and block.spread is not None:
        shares = down * block.gather[:, None, None]
        if block.places is None:
            gathered = shares.sum(dim=0, keepdim=True)
        else:
            # Sum the pages of each position, and give every page its position's sum.
            together = block.places @ block.places.T
            gathered = (together @ shares.flatten(1)).view_as(shares)
        spread = gathered * block.spread[:, None, None]
        mixed = spread if mixed is None else mixed + spread
    return torch.zeros_like(down) if mixed is None else mixed
