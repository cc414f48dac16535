"""The adapters that can be composed, and which prepared forms of them are at hand.

An adapter is kept as it was loaded, in CPU memory (pinned, where there is a GPU). Prepared forms are made from it when a
composition first asks for them, lie in a bounded number of pages on the device, and give way, the least recently used first,
when others need the room. What a composition needs never depends on its weights (but for svd), so memory does not grow
with the number of distinct compositions.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import torch

from lorafleet.composition.adapter import Adapter
from lorafleet.composition.composition import Composition
from lorafleet.composition.groups import LayerGroup
from lorafleet.composition.methods import METHODS, Method
from lorafleet.composition.pages import Pages
from lorafleet.composition.preparing import Kept, Key, Part, Preparer, Resident, write_forms
from lorafleet.errors import AdapterError, CompositionError, UnknownAdapter, closest


@dataclass(frozen=True)
class Recipe:
    """A composition that has found its adapters: it holds on to them, whatever happens to the pool meanwhile."""

    composition: Composition
    parts: tuple[Part, ...] = ()

    @property
    def prepared(self) -> bool:
        """Whether any adapter is changed before it is read."""
        return not all(part.plain for part in self.parts)


@dataclass(frozen=True, eq=False)
class Lease:
    """Pages that are held for a row, with what it takes of each.

    Attributes:
        pages: int64 [n].
        coefficients: float32 [3, n]: direct, gather and spread, as in `Mixing`.
    """

    residents: tuple[Resident, ...]
    pages: np.ndarray
    coefficients: np.ndarray

    @property
    def ready(self) -> bool:
        """Whether all pages are written, or one of them never will be."""
        return all(resident.ready for resident in self.residents)

    @property
    def waits_for(self) -> "set[Future[None]]":
        """The preparations that are under way."""
        return {one.written for one in self.residents if one.written is not None and not one.ready}

    def check(self) -> None:
        """Raise what a preparation failed with; waits for those that are under way."""
        for resident in self.residents:
            if resident.written is not None:
                resident.written.result()


class AdapterPool:
    """The adapters that can be composed on one device in one number format.

    Names may be asked for from any thread; leases belong to the one thread that runs the model.

    Args:
        groups: the base model's linear layers.
        pages: how many pages of prepared adapters fit on the device.
        page_rank: ranks of a page; 16 to 64 on GPUs.
        prepared_share: how much of the pages forms may take that a method prepares, such as pruned ones. One composition
            may always have what it needs.
    """

    def __init__(
        self,
        groups: list[LayerGroup],
        device: torch.device,
        dtype: torch.dtype,
        pages: int = 256,
        page_rank: int = 16,
        prepared_share: float = 1.0,
    ) -> None:
        self.pages = Pages(groups, pages, page_rank, device, dtype)
        self._preparer = Preparer(self.pages)
        self._most_prepared = int(prepared_share * pages)
        self._shapes = {
            module: (outputs, group.inputs)
            for group in groups
            for module, outputs in zip(group.modules, group.outputs, strict=True)
        }
        self._adapters: dict[str, Kept] = {}
        self._resident: OrderedDict[Key, Resident] = OrderedDict()
        self._retired: list[Resident] = []
        """Forms that cannot be leased any more, whose pages are not free yet."""
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
            self._adapters[adapter.name] = Kept(next(self._numbers), adapter)

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

    def prepares_too_much(self, recipe: Recipe, idle: bool = False) -> bool:
        """Whether the prepared forms of a recipe have to wait until rows with others give some back.

        Args:
            idle: whether forms that no row uses count too.
        """
        if not recipe.prepared:
            return False
        self._sweep()
        needed = sum(self.pages.needed(part.rank) for part in recipe.parts if not part.plain)
        wanted = {part.key for part in recipe.parts}
        held = [one for key, one in self._resident.items() if (idle or one.users) and not one.plain and key not in wanted]
        return sum(len(one.pages) for one in (*held, *self._retired)) + needed > max(self._most_prepared, needed)

    def lease(self, recipe: Recipe, wait: bool = True) -> Lease | None:
        """Hold what a recipe needs, loading forms that are not in pages; None while running rows leave no room for them.

        Args:
            wait: until all is prepared. Otherwise the lease may not be `ready` yet.

        Raises:
            CompositionError, MemoryError, torch.OutOfMemoryError: a form could not be prepared.
        """
        self._sweep()
        if self.prepares_too_much(recipe) or not self._make_room(recipe):
            return None
        together: dict[object, list[Part]] = {}
        for part in recipe.parts:
            if part.key not in self._resident:
                together.setdefault(part.slot.prepared if part.slot.prepared.members else part.key, []).append(part)
        # Plain forms first: should one find no memory, nothing is left that waits to be prepared.
        for parts in sorted(together.values(), key=lambda parts: not parts[0].plain):
            self._bring_in(parts)
        residents = tuple(self._resident[part.key] for part in recipe.parts)
        pages: list[int] = []
        mixings: list[tuple[float, float, float]] = []
        for part, resident in zip(recipe.parts, residents, strict=True):
            self._resident.move_to_end(part.key)
            resident.users += 1
            pages += resident.pages
            mixings += [(part.mixing.direct, part.mixing.gather, part.mixing.spread)] * len(resident.pages)
        for parts in together.values():
            self._begin_to_prepare(parts)
        coefficients = np.array(mixings, dtype=np.float32).reshape(-1, 3).T
        lease = Lease(residents, np.array(pages, dtype=np.int64), coefficients)
        if wait:
            try:
                lease.check()
            except BaseException:
                self.release(lease)
                raise
        return lease

    def release(self, lease: Lease) -> None:
        """Release a lease's pages; they keep their forms until others need them.

        A preparation that no lease waits for is cancelled.
        """
        for resident in lease.residents:
            resident.users -= 1
            if not resident.users and not resident.ready:
                self._retire(resident)

    def preparing_paused(self) -> AbstractContextManager[None]:
        """Keep preparations from computing meanwhile."""
        return self._preparer.paused()

    def _forget(self, name: str) -> None:
        kept = self._adapters.pop(name, None)
        if kept is not None:
            self._gone.add(kept.number)

    def _kept(self, name: str) -> Kept:
        kept = self._adapters.get(name)
        if kept is None:
            raise UnknownAdapter(f"no adapter named {name!r}", closest(name, self._adapters))
        return kept

    def _make_room(self, recipe: Recipe) -> bool:
        """Free the pages that a recipe lacks: of prepared forms beyond their share first, then of those unused longest."""
        wanted = {part.key for part in recipe.parts}
        missing = [part for part in recipe.parts if part.key not in self._resident]
        needed = sum(self.pages.needed(part.rank) for part in missing)
        idle = [key for key, resident in self._resident.items() if resident.users == 0 and key not in wanted]
        if needed > self.pages.free + sum(len(self._resident[key].pages) for key in idle):
            return False
        prepared = [key for key in idle if not self._resident[key].plain]
        while self.prepares_too_much(recipe, idle=True) and prepared:
            self.pages.give(self._resident.pop(prepared.pop(0)).pages)
        for key in idle:
            if self.pages.free >= needed:
                break
            if key in self._resident:
                self.pages.give(self._resident.pop(key).pages)
        return True

    def _sweep(self) -> None:
        """Free the pages of retired forms and of adapters that have left the pool, once no row uses them."""
        for resident in [one for one in self._resident.values() if one.failed]:
            self._retire(resident)
        for resident in [one for one in self._retired if one.ready and not one.users]:
            self._retired.remove(resident)
            self.pages.give(resident.pages)
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

    def _retire(self, resident: Resident) -> None:
        """Keep a form from being leased; `_sweep` frees its pages."""
        del self._resident[resident.key]
        self._retired.append(resident)

    def _bring_in(self, parts: Sequence[Part]) -> None:
        """Take pages for what comes out of one preparation; plain forms are written at once."""
        residents = [Resident(part.key, self.pages.take(part.rank), part.plain) for part in parts]
        if parts[0].plain:
            try:
                write_forms(self.pages, parts, [resident.pages for resident in residents], nullcontext)
            except BaseException:
                for resident in residents:
                    self.pages.give(resident.pages)
                raise
        self._resident.update((resident.key, resident) for resident in residents)
        with self._lock:
            # A recipe may be older than the removal of its adapters, and the sweep that followed.
            sources = parts[0].sources
            self._gone.update(kept.number for name, kept in sources.items() if self._adapters.get(name) is not kept)

    def _begin_to_prepare(self, parts: Sequence[Part]) -> None:
        """Start preparing forms that are not plain. They must be held: without users, they are not prepared."""
        if not parts[0].plain:
            residents = [self._resident[part.key] for part in parts]
            written = self._preparer.begin(parts, residents)
            for resident in residents:
                resident.written = written


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
