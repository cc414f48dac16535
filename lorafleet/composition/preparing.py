"""Prepare forms of adapters and write them into pages: at once, or on a thread of their own.

A method may change an adapter's tensors before they are read (pruned, thinned, decomposed). That takes longer than a step
of the model, so it has a thread of its own, and on a GPU a stream of its own: running rows do not wait for it.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch

from lorafleet.composition.adapter import Adapter, LowRank
from lorafleet.composition.methods import METHODS, Mixing, Slot
from lorafleet.composition.pages import Pages

PREPARED_AT_ONCE = 64 * 2**20
"""Bytes of adapters as they were loaded; a method may need some ten times as much to prepare them."""
PLAIN = "plain"
Key = tuple[Slot, tuple[int, ...]]
"""A slot, and the numbers of the adapters that it is prepared from: equal where the prepared tensors are."""


@dataclass(frozen=True)
class Kept:
    """An adapter in the pool; the number tells it from another of the same name, before or after it."""

    number: int
    adapter: Adapter


@dataclass(frozen=True)
class Part:
    """A slot of a recipe: how it is prepared and from what, and its coefficients."""

    slot: Slot
    sources: Mapping[str, Kept]
    mixing: Mixing

    @property
    def key(self) -> Key:
        """Equal where the prepared tensors are."""
        return self.slot, tuple(kept.number for kept in self.sources.values())

    @property
    def rank(self) -> int:
        """The rank of the prepared adapter."""
        return max(kept.adapter.rank for kept in self.sources.values())

    @property
    def plain(self) -> bool:
        """Whether the adapter is read as it was loaded."""
        return self.slot.prepared.kind == PLAIN


@dataclass(eq=False)
class Resident:
    """A form of an adapter, in the pages that were taken for it.

    Attributes:
        users: the leases that hold it.
        written: done once its pages hold it; None for a form that was written at once.
    """

    key: Key
    pages: tuple[int, ...]
    plain: bool
    users: int = 0
    written: "Future[None] | None" = field(default=None)

    @property
    def ready(self) -> bool:
        """Whether the pages are written, or never will be."""
        return self.written is None or self.written.done()

    @property
    def failed(self) -> bool:
        """Whether it could not be prepared, or nobody wanted it any more."""
        return self.written is not None and self.written.done() and self.written.exception() is not None


class Preparer:
    """Prepares forms on a thread of its own, one preparation after the other."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._executor = ThreadPoolExecutor(1, "preparing")
        self._computing = threading.Lock()
        # One for all: the memory of what is computed on a stream goes to what comes next on it.
        cuda = pages.device.type == "cuda"
        self._stream = torch.cuda.Stream(pages.device) if cuda else None  # type: ignore[no-untyped-call]

    def begin(self, parts: Sequence[Part], residents: Sequence[Resident]) -> "Future[None]":
        """Prepare the parts of one preparation, and write them into the pages of their residents.

        The future fails with `CancelledError` once nobody holds the residents.
        """
        before = None
        if self._stream is not None:
            # The GPU may still be computing with the former content of these pages.
            before = torch.cuda.Event()  # type: ignore[no-untyped-call]
            before.record(torch.cuda.current_stream(self._pages.device))
        try:
            return self._executor.submit(self._run, parts, residents, before)
        except RuntimeError as error:
            # The machine has no thread left.
            failed: Future[None] = Future()
            failed.set_exception(error)
            return failed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the thread from computing meanwhile: a CUDA graph that is being captured allows no random numbers."""
        with self._computing:
            yield

    @torch.inference_mode()
    def _run(self, parts: Sequence[Part], residents: Sequence[Resident], before: torch.cuda.Event | None) -> None:
        @contextmanager
        def turn() -> Iterator[None]:
            if not any(one.users for one in residents):
                raise CancelledError
            with self._computing:
                yield

        pages = [one.pages for one in residents]
        if self._stream is None or before is None:
            write_forms(self._pages, parts, pages, turn)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(before)
            write_forms(self._pages, parts, pages, turn)
        self._stream.synchronize()


def write_forms(
    into: Pages, parts: Sequence[Part], pages: Sequence[tuple[int, ...]], turn: Callable[[], AbstractContextManager[None]]
) -> None:
    """Prepare slots that come out of one preparation, and write each into its pages.

    Args:
        turn: a context for each batch of layers, and for writing them.
    """
    prepared, sources, rank = parts[0].slot.prepared, parts[0].sources, parts[0].rank
    layers: dict[str, dict[str, LowRank]] = {part.slot.adapter: {} for part in parts}
    for modules in _batches([kept.adapter for kept in sources.values()]):
        with turn():
            present: Mapping[str, Mapping[str, LowRank]] = {
                module: {
                    name: kept.adapter.layers[module].to(into.device)
                    for name, kept in sources.items()
                    if module in kept.adapter.layers
                }
                for module in modules
            }
            if prepared.kind != PLAIN:
                present = METHODS[prepared.kind].prepare(prepared, present)
            for module, of_layer in present.items():
                for name in layers.keys() & of_layer.keys():
                    layers[name][module] = of_layer[name].first(rank)
    for part, taken in zip(parts, pages, strict=True):
        with turn():
            into.write(taken, layers[part.slot.adapter], rank)


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
