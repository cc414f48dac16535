"""How a plan changes a model: layers that share an input become one product, and the adapters' part is added to it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from lorafleet.composition.blocks import BlockTable
from lorafleet.composition.composition import Composition
from lorafleet.composition.groups import LayerGroup, layer_groups
from lorafleet.composition.plan import Plan, Run, make_plan
from lorafleet.composition.pool import AdapterPool, Lease
from lorafleet.composition.products import add_composed_
from lorafleet.composition.tables import block_for, make_table
from lorafleet.errors import CompositionError
from lorafleet.packing import PackedLinear, packs

BESIDE_TOKENS = 256
Product = Callable[[torch.Tensor], torch.Tensor]
HALF = (torch.bfloat16, torch.float16)


class ComposedModel:
    """A base model whose linear layers obey a plan while one is active; without one it is the base model itself.

    The layers' weights are laid out anew, those of a group together: views of one tensor, or, where oneDNN packs them for a
    CPU, nothing. So the model takes no more memory than before, and cannot be saved any more. Modules stay where they are,
    with another `forward`.

    Args:
        pages, page_rank, prepared_share: as in `AdapterPool`.
    """

    def __init__(self, model: nn.Module, pages: int = 256, page_rank: int = 16, prepared_share: float = 1.0) -> None:
        self.model = model
        groups = layer_groups(model)
        parameter = next(model.parameters())
        self.pool = AdapterPool(groups, parameter.device, parameter.dtype, pages, page_rank, prepared_share)
        self.by_kernels = parameter.is_cuda and parameter.dtype in HALF and find_spec("triton") is not None
        """Whether Triton kernels compute the adapters' part."""
        self._side = torch.cuda.Stream(parameter.device) if self.by_kernels else None  # type: ignore[no-untyped-call]
        self._plan: Plan | BlockTable | None = None
        self._last: tuple[list[Run], Plan | BlockTable] | None = None
        for number, group in enumerate(groups):
            _GroupedLayers([model.get_submodule(module) for module in group.modules], partial(self._compute, number, group))
        _pack_head(model)

    def plan(self, runs: Sequence[Run]) -> Plan | BlockTable | None:
        """The plan of a pass over these runs, one behind the other; the last one is at hand while the runs stay the same."""
        if not any(run.lease is not None and run.lease.pages.size for run in runs):
            return None
        if self._last is None or self._last[0] != list(runs):
            pages = self.pool.pages
            block = block_for(sum(run.tokens for run in runs))
            self._last = (list(runs), make_table(runs, pages, block) if self.by_kernels else make_plan(runs, pages))
        return self._last[1]

    @contextmanager
    def following(self, plan: Plan | BlockTable | None) -> Iterator[None]:
        """Apply a plan to every forward pass in the block; the passes have the plan's tokens."""
        before, self._plan = self._plan, plan
        try:
            yield
        finally:
            self._plan = before

    @contextmanager
    def composed(self, compositions: Sequence[Composition], tokens: int) -> Iterator[None]:
        """Give each row of the block's batches its composition; the rows have `tokens` tokens each.

        Raises:
            UnknownAdapter, CompositionError: a composition cannot be made from the pool.
        """
        leases: list[Lease] = []
        try:
            for composition in compositions:
                lease = self.pool.lease(self.pool.recipe(composition))
                if lease is None:
                    raise CompositionError(
                        f"the pool's room for {self.pool.pages.ranks} ranks is too small for all rows",
                        "Raise generation.adapter_ranks, or use fewer rows at once",
                    )
                leases.append(lease)
            with self.following(self.plan([Run(lease, tokens) for lease in leases])):
                yield
        finally:
            for lease in leases:
                self.pool.release(lease)

    def _compute(self, number: int, group: LayerGroup, product: Product, x: torch.Tensor) -> torch.Tensor:
        """The output of a group: the base layers' product, and the adapters' part."""
        plan, tensors = self._plan, self.pool.pages.tensors[number]
        if plan is None or tensors is None:
            return product(x)
        rows = x.flatten(0, -2)
        if isinstance(plan, Plan):
            y = product(x)
            add_composed_(y.flatten(0, -2), rows, group, tensors, plan)
            return y
        # Where there is no GPU, there may be no Triton.
        from lorafleet.composition.kernels import add_ranks_, composed_ranks

        with self._beside(len(rows)):
            ranks = composed_ranks(rows, tensors.a, plan, len(group.modules))
        y = product(x)
        self._joined(len(rows))
        add_ranks_(y.flatten(0, -2), ranks, tensors.b, plan, group.outputs)
        return y

    @contextmanager
    def _beside(self, tokens: int) -> Iterator[None]:
        """Run the block beside what follows, where few tokens leave the GPU waiting for memory: in a captured graph."""
        if self._side is None or not _goes_beside(tokens):
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            yield

    def _joined(self, tokens: int) -> None:
        """Wait for what runs beside. The side begins with a wait for what was before it, so memory goes back in order."""
        if self._side is not None and _goes_beside(tokens):
            torch.cuda.current_stream().wait_stream(self._side)


def _goes_beside(tokens: int) -> bool:
    return tokens <= BESIDE_TOKENS and torch.cuda.is_current_stream_capturing()


def _pack_head(model: nn.Module) -> None:
    """Pack the layer that gives the logits; where the embedding of the tokens shares its weight, that one stays."""
    if not isinstance(model, PreTrainedModel):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is nn.Linear and packs(head.weight):
        head.forward = PackedLinear(head.weight.data, head.bias)  # type: ignore[assignment]
        if head.weight is not embedding.weight:
            head.weight.data = head.weight.new_empty(0)


class _GroupedLayers:
    """The first of a group's layers to see a tensor computes all of them; the others find their part waiting."""

    def __init__(self, layers: Sequence[nn.Module], compute: Callable[[Product, torch.Tensor], torch.Tensor]) -> None:
        self._compute = compute
        self._widths = [int(layer.out_features) for layer in layers]  # type: ignore[arg-type]
        self._input: torch.Tensor | None = None
        self._waiting: dict[int, torch.Tensor] = {}
        self._product = self._one_product(layers) if type(layers[0]) is nn.Linear else layers[0].forward
        for place, layer in enumerate(layers):
            layer.forward = partial(self._forward, place)

    def _one_product(self, layers: Sequence[nn.Module]) -> Product:
        bias = self._together(layers, "bias") if layers[0].bias is not None else None
        weight = self._together(layers, "weight")
        if not packs(weight):
            return partial(linear, weight=weight, bias=bias)
        for layer in layers:
            layer.get_parameter("weight").data = weight.new_empty(0)
        return PackedLinear(weight, bias)

    def _together(self, layers: Sequence[nn.Module], name: str) -> torch.Tensor:
        """One tensor of the layers' parameters, which become views of it."""
        parameters = [layer.get_parameter(name) for layer in layers]
        if len(parameters) == 1:
            return parameters[0].data
        together = torch.cat([parameter.data for parameter in parameters])
        for parameter, part in zip(parameters, torch.split(together, self._widths), strict=True):
            parameter.data = part
        return together

    def _forward(self, place: int, x: torch.Tensor) -> torch.Tensor:
        if x is not self._input or place not in self._waiting:
            y = self._compute(self._product, x)
            self._waiting = dict(enumerate(torch.split(y, self._widths, dim=-1)))
            self._input = x
        mine = self._waiting.pop(place)
        if not self._waiting:
            self._input = None
        return mine
