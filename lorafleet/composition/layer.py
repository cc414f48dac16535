"""How a plan changes a model: every covered linear layer adds its rows' composed adapters to its output."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from lorafleet.composition.pool import AdapterPool, Coefficients, LayerStack, Plan


def composed_delta(x: torch.Tensor, stack: LayerStack, coefficients: Coefficients, rank: int) -> torch.Tensor:
    """What the composed adapters add to one layer's output.

    Args:
        x: the layer's input, [rows, tokens, inputs].

    Returns:
        [rows, tokens, outputs], in x's dtype.
    """
    rows, tokens, _ = x.shape
    down = linear(x, stack.a).view(rows, tokens, -1, rank)
    if coefficients.uses_sums:
        gathered = torch.einsum("btsr,bs->btr", down, coefficients.gather)
        mixed = gathered[:, :, None, :] * coefficients.spread[:, None, :, None]
        if coefficients.uses_direct:
            mixed = mixed + down * coefficients.direct[:, None, :, None]
    else:
        mixed = down * coefficients.direct[:, None, :, None]
    return mixed.flatten(2) @ stack.b


class ComposedModel:
    """A base model whose linear layers obey a plan while one is active; without one it is the base model itself.

    The model is changed by forward hooks alone: its weights and modules stay as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._plan: Plan | None = None
        layers = {
            name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
        }
        parameter = next(model.parameters())
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        self.pool = AdapterPool(shapes, parameter.device, parameter.dtype)
        for name, layer in layers.items():
            layer.register_forward_hook(self._hook(name))

    @contextmanager
    def composed(self, plan: Plan) -> Iterator[None]:
        """Apply a plan to every forward pass in the block; the passes' batches have the plan's rows."""
        before, self._plan = self._plan, plan if plan.slots else None
        try:
            yield
        finally:
            self._plan = before

    def _hook(self, name: str) -> Any:
        def add_delta(_: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            plan = self._plan
            if plan is None or name not in plan.stacks:
                return None
            return output + composed_delta(arguments[0], plan.stacks[name], plan.coefficients[name], plan.rank)

        return add_delta
