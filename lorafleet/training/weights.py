"""An adapter's weights as one vector: one optimiser kernel, one norm, one all-reduce, instead of hundreds of each."""

import torch
from peft import PeftModel


class Weights:
    """The weights in training, in float32, and their gradients; the layers hold views.

    The optimiser works on `master`. Where the layers compute in another format they hold a copy in it, so that nothing is
    cast on the way through them: `collect` brings their gradients over, `spread` the weights back.

    Args:
        adapter: a model with LoRA layers; their weights are moved into the vector.
        dtype: what the layers compute in.

    Attributes:
        master: float32 (n), a parameter, with its gradient.
        sums: float32 (n + 2): that gradient, the loss, and how many processes failed. What several processes add up.
    """

    def __init__(self, adapter: PeftModel, dtype: torch.dtype) -> None:
        self._layers = [weight for weight in adapter.parameters() if weight.requires_grad]
        flat = torch.cat([weight.detach().flatten().float() for weight in self._layers])
        self.master = torch.nn.Parameter(flat)
        self.sums = flat.new_zeros(len(flat) + 2)
        self.master.grad = self.sums[: len(flat)]
        self.loss, self.failures = self.sums[-2], self.sums[-1]
        shared = dtype == torch.float32
        self._working = flat if shared else flat.to(dtype)
        self._gradient = self.master.grad if shared else torch.zeros_like(self._working)
        self._place(self._working, self._gradient)

    def _place(self, vector: torch.Tensor, gradient: torch.Tensor | None) -> None:
        start = 0
        for weight in self._layers:
            end = start + weight.numel()
            weight.data = vector[start:end].view_as(weight)
            weight.grad = None if gradient is None else gradient[start:end].view_as(weight)
            start = end

    @torch.no_grad()
    def collect(self) -> None:
        """Add what the layers' backward pass gave to the gradient of `master`."""
        if self._gradient is not self.master.grad:
            assert self.master.grad is not None
            self.master.grad.add_(self._gradient)
            self._gradient.zero_()

    @torch.no_grad()
    def spread(self) -> None:
        """Give the layers the weights that `master` has now."""
        if self._working.dtype != self.master.dtype:
            self._working.copy_(self.master)

    def hand_back(self) -> None:
        """Give the layers weights of their own, in float32, to be saved."""
        self._place(self.master.detach().clone(), None)
