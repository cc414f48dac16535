"""Adapters made in memory, the same for PEFT and for the pool, and what the pool makes of a composition."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from conftest import MODULES, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from lorafleet.composition import Adapter, AdapterPool, Composition, LowRank, Run
from lorafleet.composition.groups import LayerGroup
from lorafleet.composition.plan import make_plan
from lorafleet.composition.products import add_composed_


@dataclass(frozen=True)
class Shape:
    """Everything of an adapter but its values."""

    rank: int = 4
    alpha: int = 8
    modules: tuple[str, ...] = tuple(MODULES)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, int] = field(default_factory=dict)
    rank_stabilised: bool = False

    def config(self) -> LoraConfig:
        """The same in PEFT's words."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.modules),
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            use_rslora=self.rank_stabilised,
        )


def in_peft(shapes: Mapping[str, Shape], seed: int = 0) -> PeftModel:
    """The tiny Llama with an adapter of random A and B for each shape."""
    first, *others = shapes
    model = get_peft_model(tiny_llama(), shapes[first].config(), adapter_name=first)
    assert isinstance(model, PeftModel)
    for name in others:
        model.add_adapter(name, shapes[name].config())
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.03)
    return model


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """The layers with adapters, by their names in the base model."""
    found = model.get_base_model().named_modules()
    return {name: module for name, module in found if isinstance(module, LoraLayer)}


def taken_from(model: PeftModel, name: str) -> Adapter:
    """An adapter in PEFT's hands, as the pool takes it; the tensors are PEFT's own."""
    return Adapter(
        name,
        {
            module: LowRank(layer.lora_A[name].weight.data, layer.lora_B[name].weight.data, layer.scaling[name])
            for module, layer in lora_layers(model).items()
            if name in layer.lora_A
        },
    )


def pool_of(*adapters: Adapter, pages: int = 64, page_rank: int = 4, prepared_share: float = 1.0) -> AdapterPool:
    """A pool in float32 for the layers that the adapters change, each layer a group by itself."""
    groups = {
        module: LayerGroup((module,), layer.a.shape[1], (layer.b.shape[0],))
        for adapter in adapters
        for module, layer in adapter.layers.items()
    }
    pool = AdapterPool(list(groups.values()), torch.device("cpu"), torch.float32, pages, page_rank, prepared_share)
    for adapter in adapters:
        pool.add(adapter)
    return pool


def random_adapter(name: str, *, rank: int = 4, alpha: float = 8, seed: int = 0) -> Adapter:
    """An adapter of two layers, `first` from 12 features to 10 and `second` back.

    The values of a tensor are all different, and whole numbers over 1024: sums of them are exact in float32, and which
    ones are the largest, or what sign a sum has, is no matter of rounding.
    """
    draws = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        sizes = torch.randperm(count, generator=draws) + 1
        signs = torch.randint(0, 2, (count,), generator=draws) * 2 - 1
        return (sizes * signs).view(shape) / 1024

    layers = {
        "first": LowRank(values(rank, 12), values(10, rank), alpha / rank),
        "second": LowRank(values(rank, 10), values(12, rank), alpha / rank),
    }
    return Adapter(name, layers)


def changes(pool: AdapterPool, composition: Composition) -> dict[str, torch.Tensor]:
    """What a composition adds to the weight of each layer, [outputs, inputs]: its answer to a batch of unit vectors."""
    lease = pool.lease(pool.recipe(composition))
    assert lease is not None
    found = {}
    for group, tensors in zip(pool.pages.groups, pool.pages.tensors, strict=True):
        y = torch.zeros(group.inputs, group.starts[-1])
        if tensors is not None:
            add_composed_(y, torch.eye(group.inputs), group, tensors, make_plan([Run(lease, group.inputs)], pool.pages))
        found |= dict(zip(group.modules, y.T.split(group.outputs), strict=True))
    pool.release(lease)
    return found


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far two tensors are from each other, measured by the second."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))
