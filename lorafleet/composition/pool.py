"""The adapters there are, and the plan that applies a batch's compositions.

Attribute `slots` of a plan are the prepared adapters that any row reads; the rows differ only in a small matrix of
coefficients (rows x slots). Memory grows with the adapters in use, never with the number of distinct compositions.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lorafleet.composition.adapter import Adapter, LowRank
from lorafleet.composition.composition import Composition
from lorafleet.composition.methods import METHODS, Method, Mixing, Prepared, Slot
from lorafleet.errors import AdapterError, CompositionError, UnknownAdapter, closest

PREPARED_SLOTS_KEPT = 128


@dataclass(frozen=True)
class LayerStack:
    """The slots of one layer, one under the other, padded with zeros to one rank.

    Attributes:
        a: [slots * rank, inputs].
        b: [slots * rank, outputs].
    """

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True)
class Coefficients:
    """How much of each slot a row takes, [rows, slots] each; `method.Mixing` says what they mean."""

    direct: torch.Tensor
    gather: torch.Tensor
    spread: torch.Tensor
    uses_direct: bool
    uses_sums: bool

    def select(self, rows: torch.Tensor) -> "Coefficients":
        """The coefficients of some of the rows, in that order (int64 [n])."""
        return Coefficients(self.direct[rows], self.gather[rows], self.spread[rows], self.uses_direct, self.uses_sums)


@dataclass(frozen=True)
class Plan:
    """Everything that a model needs to apply a batch's compositions.

    Attributes:
        rank: the rank that all slots are padded to.
        stacks: by module name.
        coefficients: by module name; layers whose adapters have the same scales share one.
    """

    rows: int
    rank: int
    slots: tuple[Slot, ...]
    stacks: Mapping[str, LayerStack]
    coefficients: Mapping[str, Coefficients]

    def select(self, rows: torch.Tensor) -> "Plan":
        """The plan of some of the rows, in that order, repeats allowed (int64 [n])."""
        selected = {id(shared): shared.select(rows) for shared in self.coefficients.values()}
        coefficients = {module: selected[id(shared)] for module, shared in self.coefficients.items()}
        return Plan(len(rows), self.rank, self.slots, self.stacks, coefficients)


class AdapterPool:
    """The adapters that can be composed, on one device in one number format.

    Args:
        shapes: (outputs, inputs) of every linear layer of the base model, by module name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], device: torch.device, dtype: torch.dtype) -> None:
        self._shapes = dict(shapes)
        self._device, self._dtype = device, dtype
        self._adapters: dict[str, Adapter] = {}
        self._prepared: OrderedDict[Slot, Mapping[str, LowRank]] = OrderedDict()
        self._last_stacks: tuple[tuple[Slot, ...], int, Mapping[str, LayerStack]] | None = None

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise UnknownAdapter(f"no adapter named {name!r}", closest(name, self._adapters))
        return self._adapters[name]

    def add(self, adapter: Adapter) -> None:
        """Take an adapter in; one of the same name is replaced.

        Raises:
            AdapterError: it changes a layer that the base model does not have, or of another shape.
        """
        for module, layer in adapter.layers.items():
            shape = (layer.b.shape[0], layer.a.shape[1])
            if self._shapes.get(module) != shape:
                has = self._shapes.get(module, "no such layer")
                raise AdapterError(
                    f"adapter {adapter.name}: {module} is {shape}, the base model has {has}",
                    "Was it trained on another model?",
                )
        self.remove(adapter.name)
        self._adapters[adapter.name] = adapter.to(self._device, self._dtype)

    def remove(self, name: str) -> None:
        """Take an adapter out, and everything prepared from it; nothing happens where there is none."""
        self._adapters.pop(name, None)
        for slot in [slot for slot in self._prepared if slot.adapter == name or _takes_part(name, slot.prepared)]:
            del self._prepared[slot]
        self._last_stacks = None

    def plan(self, compositions: Sequence[Composition]) -> Plan:
        """The plan of a batch, one composition a row.

        Raises:
            UnknownAdapter: a weight names an adapter that is not in the pool.
            CompositionError: the method is unknown, or its adapters do not have one rank.
        """
        rows: list[dict[Slot, tuple[Method, float]]] = [self._slots_of(composition) for composition in compositions]
        slots = tuple(sorted({slot for row in rows for slot in row}, key=repr))
        rank = max((self._adapters[slot.adapter].rank for slot in slots), default=0)
        stacks = self._stacks(slots, rank)
        shared: dict[tuple[float, ...], Coefficients] = {}
        coefficients = {}
        for module in stacks:
            scales = tuple(self._scale(slot, module) for slot in slots)
            if scales not in shared:
                shared[scales] = self._coefficients(rows, slots, scales)
            coefficients[module] = shared[scales]
        return Plan(len(rows), rank, slots, stacks, coefficients)

    def _slots_of(self, composition: Composition) -> dict[Slot, tuple[Method, float]]:
        method = find_method(composition.method)
        adapters = [self[name] for name in composition.weights]
        ranks = {adapter.name: adapter.rank for adapter in adapters}
        if method.equal_ranks and len(set(ranks.values())) > 1:
            listed = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
            raise CompositionError(f"method {composition.method} needs adapters of one rank, these have {listed}", "Use cat")
        if len(adapters) == 1:
            # Nothing to combine: the adapter as it is, whatever the method would prune (PEFT does the same).
            method = METHODS["cat"]
        prepared = method.prepared(composition)
        return {Slot(name, prepared): (method, weight) for name, weight in composition.weights.items()}

    def _scale(self, slot: Slot, module: str) -> float:
        layer = self._adapters[slot.adapter].layers.get(module)
        return layer.scale if layer else 0.0

    def _coefficients(
        self, rows: Sequence[Mapping[Slot, tuple[Method, float]]], slots: Sequence[Slot], scales: Sequence[float]
    ) -> Coefficients:
        nothing = Mixing()
        table = torch.zeros(3, len(rows), len(slots))
        for number, row in enumerate(rows):
            for place, (slot, scale) in enumerate(zip(slots, scales, strict=True)):
                mixing = row[slot][0].mixing(row[slot][1], scale) if slot in row else nothing
                table[:, number, place] = torch.tensor([mixing.direct, mixing.gather, mixing.spread])
        uses_direct, uses_sums = bool(table[0].any()), bool(table[1].any())
        direct, gather, spread = table.to(self._device, self._dtype)
        return Coefficients(direct, gather, spread, uses_direct, uses_sums)

    def _stacks(self, slots: tuple[Slot, ...], rank: int) -> Mapping[str, LayerStack]:
        if self._last_stacks is not None and self._last_stacks[:2] == (slots, rank):
            return self._last_stacks[2]
        layers = [self._layers(slot) for slot in slots]
        modules = sorted({module for layer in layers for module in layer})
        stacks = {module: self._stack(module, [layer.get(module) for layer in layers], rank) for module in modules}
        self._last_stacks = (slots, rank, stacks)
        return stacks

    def _stack(self, module: str, layers: Sequence[LowRank | None], rank: int) -> LayerStack:
        outputs, inputs = self._shapes[module]
        a = torch.zeros(len(layers), rank, inputs, device=self._device, dtype=self._dtype)
        b = torch.zeros(len(layers), rank, outputs, device=self._device, dtype=self._dtype)
        for place, layer in enumerate(layers):
            if layer is not None:
                a[place, : layer.rank] = layer.a
                b[place, : layer.rank] = layer.b.T
        return LayerStack(a.flatten(0, 1), b.flatten(0, 1))

    def _layers(self, slot: Slot) -> Mapping[str, LowRank]:
        """A slot's tensors; prepared ones are kept, the least recently used given up first."""
        if slot.prepared.kind == "plain":
            return self._adapters[slot.adapter].layers
        if slot not in self._prepared:
            self._prepare(slot)
        self._prepared.move_to_end(slot)
        layers = self._prepared[slot]
        while len(self._prepared) > PREPARED_SLOTS_KEPT:
            self._prepared.popitem(last=False)
        return layers

    def _prepare(self, slot: Slot) -> None:
        members = _members(slot.prepared) or (slot.adapter,)
        adapters = {name: self._adapters[name] for name in members}
        done: dict[str, dict[str, LowRank]] = {name: {} for name in members}
        for module in sorted({module for adapter in adapters.values() for module in adapter.layers}):
            present = {name: adapter.layers[module] for name, adapter in adapters.items() if module in adapter.layers}
            for name, layer in METHODS[slot.prepared.kind].prepare(slot.prepared, present).items():
                done[name][module] = layer
        for name, layers in done.items():
            self._prepared[Slot(name, slot.prepared)] = layers


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        CompositionError: there is none.
    """
    if name not in METHODS:
        raise CompositionError(f"method is {name!r}", f"Known: {', '.join(METHODS)}")
    return METHODS[name]


def _members(prepared: Prepared) -> tuple[str, ...]:
    """The adapters that a preparation depends on together; none where each is prepared by itself."""
    return next((setting for setting in prepared.settings if isinstance(setting, tuple)), ())


def _takes_part(name: str, prepared: Prepared) -> bool:
    return name in _members(prepared)
