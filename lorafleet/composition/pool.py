"""The adapters that can be composed, and which prepared forms of them are at hand.

An adapter is kept as it was loaded, in CPU memory (pinned, where there is a GPU). Prepared forms are made from it when a
composition first asks for them, lie in a bounded number of pages on the device, and give way, the least recently used first,
when others need the room. What a composition needs never depends on its weights (but for svd), so memory does not grow
with the number of distinct compositions.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import torch

from lorafleet.composition.adapter import Adapter, LowRank
from lorafleet.composition.composition import Composition
from lorafleet.composition.groups import LayerGroup
from lorafleet.composition.methods import METHODS, Method, Mixing, Slot
from lorafleet.composition.pages import Pages
from lorafleet.errors import AdapterError, CompositionError, UnknownAdapter, closest

PREPARED_AT_ONCE = 64 * 2**20
"""Bytes of adapters as they were loaded; a method may need some ten times as much to prepare them."""


@dataclass(frozen=True)
class _Kept:
    """An adapter in the pool; the number tells it from another of the same name, before or after it."""

    number: int
    adapter: Adapter


@dataclass(frozen=True)
class Part:
    """A slot of a recipe: how it is prepared and from what, and its coefficients."""

    slot: Slot
    sources: Mapping[str, _Kept]
    mixing: Mixing

    @property
    def key(self) -> tuple[Slot, tuple[int, ...]]:
        """Equal where the prepared tensors are."""
        return self.slot, tuple(kept.number for kept in self.sources.values())

    @property
    def rank(self) -> int:
        """The rank of the prepared adapter."""
        return max(kept.adapter.rank for kept in self.sources.values())


@dataclass(frozen=True)
class Recipe:
    """A composition that has found its adapters: it holds on to them, whatever happens to the pool meanwhile."""

    composition: Composition
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, eq=False)
class Lease:
    """Pages that are held for a row, with what it takes of each.

    Attributes:
        pages: int64 [n].
        coefficients: float32 [3, n]: direct, gather and spread, as in `Mixing`.
    """

    keys: tuple[tuple[Slot, tuple[int, ...]], ...]
    pages: np.ndarray
    coefficients: np.ndarray


@dataclass
class _Resident:
    pages: tuple[int, ...]
    users: int = 0


class AdapterPool:
    """The adapters that can be composed on one device in one number format.

    Names may be asked for from any thread; leases belong to the one thread that runs the model.

    Args:
        groups: the base model's linear layers.
        pages: how many pages of prepared adapters fit on the device.
        page_rank: ranks of a page; 16 to 64 on GPUs.
    """

    def __init__(
        self, groups: list[LayerGroup], device: torch.device, dtype: torch.dtype, pages: int = 256, page_rank: int = 16
    ) -> None:
        self.pages = Pages(groups, pages, page_rank, device, dtype)
        self._shapes = {
            module: (outputs, group.inputs)
            for group in groups
            for module, outputs in zip(group.modules, group.outputs, strict=True)
        }
        self._adapters: dict[str, _Kept] = {}
        self._resident: OrderedDict[tuple[Slot, tuple[int, ...]], _Resident] = OrderedDict()
        self._numbers = count()
        self._gone: set[int] = set()
        self._lock = threading.Lock()

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._adapters))

    def __len__(self) -> int:
        return len(self._adapters)

    def __getitem__(self, name: str) -> Adapter:
        return self._kept(name).adapter

    def add(self, adapter: Adapter) -> None:
        """Take an adapter in; one of the same name is replaced for what is asked from now on.

        Raises:
            AdapterError: it changes a layer that the base model does not have, or of another shape, or is too large.
        """
        for module, layer in adapter.layers.items():
            shape = (layer.b.shape[0], layer.a.shape[1])
            if self._shapes.get(module) != shape:
                has = self._shapes.get(module, "no such layer")
                raise AdapterError(
                    f"adapter {adapter.name}: {module} is {shape}, the base model has {has}",
                    "Was it trained on another model?",
                )
        if self.pages.needed(adapter.rank) > self.pages.count:
            raise AdapterError(
                f"adapter {adapter.name} has rank {adapter.rank}, the pool has room for {self.pages.ranks}",
                "Raise generation.adapter_ranks",
            )
        if self.pages.device.type == "cuda":
            adapter = adapter.pinned()
        with self._lock:
            self.pages.cover(adapter.layers, adapter.rank)
            self._forget(adapter.name)
            self._adapters[adapter.name] = _Kept(next(self._numbers), adapter)

    def remove(self, name: str) -> None:
        """Take an adapter out; nothing happens where there is none. Rows that use it keep it until they are done."""
        with self._lock:
            self._forget(name)

    def recipe(self, composition: Composition) -> Recipe:
        """Find what a composition needs.

        Raises:
            UnknownAdapter: a weight names an adapter that is not in the pool.
            CompositionError: the method is unknown, its adapters do not have one rank, or they do not all fit in.
        """
        method = find_method(composition.method)
        if composition.is_base:
            return Recipe(composition)
        with self._lock:
            kept = {name: self._kept(name) for name in method.weights(composition.weights)}
        chosen = replace(composition, weights=method.weights(composition.weights))
        if len(kept) == 1:
            # Nothing to combine: the adapter as it is, whatever the method would prune (PEFT does the same).
            method = METHODS["cat"]
        elif method.equal_ranks:
            _check_ranks(composition.method, [one.adapter for one in kept.values()])
        parts = tuple(
            Part(slot, {name: kept[name] for name in slot.prepared.members or (slot.adapter,)}, mixing)
            for slot, mixing in method.parts(chosen).items()
        )
        needed = sum(self.pages.needed(part.rank) for part in parts)
        if needed > self.pages.count:
            raise CompositionError(
                f"the composition takes {needed * self.pages.rank} ranks, the pool has room for {self.pages.ranks}",
                "Use fewer adapters, or raise generation.adapter_ranks",
            )
        return Recipe(composition, parts)

    def lease(self, recipe: Recipe) -> Lease | None:
        """Hold what a recipe needs, bringing in what is not at hand; None while rows on their way leave no room for it."""
        self._sweep()
        missing = [part for part in recipe.parts if part.key not in self._resident]
        wanted = {part.key for part in recipe.parts}
        if not self._make_room(sum(self.pages.needed(part.rank) for part in missing), wanted):
            return None
        together: dict[object, list[Part]] = {}
        for part in missing:
            together.setdefault(part.slot.prepared if part.slot.prepared.members else part.key, []).append(part)
        for parts in together.values():
            self._bring_in(parts)
        pages: list[int] = []
        mixings: list[tuple[float, float, float]] = []
        for part in recipe.parts:
            resident = self._resident[part.key]
            self._resident.move_to_end(part.key)
            resident.users += 1
            pages += resident.pages
            mixings += [(part.mixing.direct, part.mixing.gather, part.mixing.spread)] * len(resident.pages)
        coefficients = np.array(mixings, dtype=np.float32).reshape(-1, 3).T
        return Lease(tuple(part.key for part in recipe.parts), np.array(pages, dtype=np.int64), coefficients)

    def release(self, lease: Lease) -> None:
        """Let go of a lease's pages; they stay at hand until others need them."""
        for key in lease.keys:
            self._resident[key].users -= 1

    def _forget(self, name: str) -> None:
        kept = self._adapters.pop(name, None)
        if kept is not None:
            self._gone.add(kept.number)

    def _kept(self, name: str) -> _Kept:
        kept = self._adapters.get(name)
        if kept is None:
            raise UnknownAdapter(f"no adapter named {name!r}", closest(name, self._adapters))
        return kept

    def _make_room(self, needed: int, wanted: set[tuple[Slot, tuple[int, ...]]]) -> bool:
        idle = [key for key, resident in self._resident.items() if resident.users == 0 and key not in wanted]
        if needed > self.pages.free + sum(len(self._resident[key].pages) for key in idle):
            return False
        for key in idle:
            if self.pages.free >= needed:
                break
            self.pages.give(self._resident.pop(key).pages)
        return True

    def _sweep(self) -> None:
        """Free the pages of adapters that have left the pool, once no row uses them."""
        with self._lock:
            gone = frozenset(self._gone)
        if not gone:
            return
        stale = [key for key in self._resident if not gone.isdisjoint(key[1])]
        for key in stale:
            if self._resident[key].users == 0:
                self.pages.give(self._resident.pop(key).pages)
        held = {number for key in stale if key in self._resident for number in key[1]}
        with self._lock:
            # Not all of them: others may have left meanwhile.
            self._gone -= gone - held

    def _bring_in(self, parts: Sequence[Part]) -> None:
        """Prepare slots that come out of one preparation, and write them into pages."""
        prepared, sources = parts[0].slot.prepared, parts[0].sources
        method, rank = METHODS.get(prepared.kind), parts[0].rank
        layers: dict[str, dict[str, LowRank]] = {part.slot.adapter: {} for part in parts}
        for modules in _batches([kept.adapter for kept in sources.values()]):
            present: Mapping[str, Mapping[str, LowRank]] = {
                module: {
                    name: kept.adapter.layers[module].to(self.pages.device)
                    for name, kept in sources.items()
                    if module in kept.adapter.layers
                }
                for module in modules
            }
            if method is not None:
                present = method.prepare(prepared, present)
            for module, of_layer in present.items():
                for name in layers.keys() & of_layer.keys():
                    layers[name][module] = of_layer[name].first(rank)
        for part in parts:
            self._resident[part.key] = _Resident(self.pages.put(layers[part.slot.adapter], rank))
        with self._lock:
            # A recipe may be older than the removal of its adapters, and the sweep that followed.
            self._gone.update(kept.number for name, kept in sources.items() if self._adapters.get(name) is not kept)


def _batches(adapters: Sequence[Adapter]) -> list[list[str]]:
    """The modules that adapters change, those of one kind together (mostly of one shape), no more at once than fit well."""
    batches: list[list[str]] = []
    last_kind, held = "", 0
    for kind, module in sorted({(module.rpartition(".")[2], module) for one in adapters for module in one.layers}):
        layers = [one.layers[module] for one in adapters if module in one.layers]
        size = sum(layer.a.nbytes + layer.b.nbytes for layer in layers)
        if kind != last_kind or held + size > PREPARED_AT_ONCE:
            batches.append([])
            last_kind, held = kind, 0
        batches[-1].append(module)
        held += size
    return batches


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        CompositionError: there is none.
    """
    if name not in METHODS:
        raise CompositionError(f"method is {name!r}", f"Known: {', '.join(METHODS)}")
    return METHODS[name]


def _check_ranks(method: str, adapters: list[Adapter]) -> None:
    for module in sorted({module for adapter in adapters for module in adapter.layers}):
        ranks = {adapter.name: adapter.layers[module].rank for adapter in adapters if module in adapter.layers}
        if len(set(ranks.values())) > 1:
            listed = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
            raise CompositionError(f"method {method} needs adapters of one rank, these have {listed}", "Use cat")
