"""The prepared adapters at hand: tensors cut into pages, so that adapters of any rank come and go without moving others."""

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorafleet.composition.adapter import LowRank
from lorafleet.composition.groups import LayerGroup

PAGE_RANKS = (64, 32, 16)


def page_rank_for(ranks: Sequence[int]) -> int:
    """The widest page that the narrowest adapter fills: wide ones are read fastest, half empty ones for nothing."""
    return next((rank for rank in PAGE_RANKS if rank <= min(ranks, default=16)), PAGE_RANKS[-1])


@dataclass(frozen=True)
class PageTensors:
    """All pages of one layer group; a page holds `rank` ranks of an adapter, and zeros where it has fewer.

    Attributes:
        a: [pages, modules * rank, inputs], the modules' A one under the other.
        b: [pages, rank, outputs of all modules], the modules' B transposed, side by side.
    """

    a: torch.Tensor
    b: torch.Tensor


class Pages:
    """A bounded number of pages, the same pages in every layer group.

    The scale alpha / rank is folded in: its root into A, its root into B, so that what a row takes of a page is one
    number for the whole model.

    Args:
        count: how many pages there are; their memory is taken when an adapter first covers a group.
        rank: ranks of a page.
    """

    def __init__(
        self, groups: Sequence[LayerGroup], count: int, rank: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.count, self.rank = count, rank
        self.groups, self.device, self.dtype = tuple(groups), device, dtype
        self.tensors: list[PageTensors | None] = [None] * len(groups)
        self.position = np.zeros(count, dtype=np.int64)
        """Of each page: how many pages of its adapter come before it."""
        self.positions = 1
        """Pages of the widest adapter that has been here."""
        self.version = 0
        """Rises when a tensor is made, or with `positions`: what has captured either must look again."""
        self._free = list(range(count))

    @property
    def ranks(self) -> int:
        """How many ranks there is room for in all."""
        return self.count * self.rank

    @property
    def bytes(self) -> int:
        """Memory that all layer groups together take, once each has been written to."""
        values = sum(len(group.modules) * group.inputs + group.starts[-1] for group in self.groups)
        return self.ranks * values * self.dtype.itemsize

    @property
    def free(self) -> int:
        """How many pages nothing lies in."""
        return len(self._free)

    def needed(self, rank: int) -> int:
        """How many pages an adapter of this rank takes."""
        return math.ceil(rank / self.rank)

    def cover(self, modules: Iterable[str], rank: int) -> None:
        """Make the tensors that an adapter of these modules and this rank will need."""
        wanted = set(modules)
        for number, group in enumerate(self.groups):
            if self.tensors[number] is None and not wanted.isdisjoint(group.modules):
                self.tensors[number] = self._made(group)
                self.version += 1
        if self.needed(rank) > self.positions:
            self.positions = self.needed(rank)
            self.version += 1

    def take(self, rank: int) -> tuple[int, ...]:
        """Take free pages for an adapter of this rank; there must be enough."""
        pages = tuple(heapq.heappop(self._free) for _ in range(self.needed(rank)))
        self.position[list(pages)] = range(len(pages))
        return pages

    def write(self, pages: Sequence[int], layers: Mapping[str, LowRank], rank: int) -> None:
        """Write the first `rank` ranks of an adapter, its layers on this device, into pages taken for it."""
        for place, page in enumerate(pages):
            for number, group in enumerate(self.groups):
                ranks = slice(place * self.rank, min((place + 1) * self.rank, rank))
                self._write(number, group, page, ranks, layers)

    def give(self, pages: Sequence[int]) -> None:
        """Free pages; what lies in them stays until they are written again."""
        for page in pages:
            heapq.heappush(self._free, page)

    def _write(self, number: int, group: LayerGroup, page: int, taken: slice, layers: Mapping[str, LowRank]) -> None:
        tensors = self.tensors[number]
        if tensors is None:
            return
        pages_a, pages_b = tensors.a[page].view(len(group.modules), self.rank, group.inputs), tensors.b[page]
        for place, module in enumerate(group.modules):
            a_page, b_page = pages_a[place], pages_b[:, group.starts[place] : group.starts[place + 1]]
            layer = layers.get(module)
            ranks = 0
            if layer is not None:
                root = math.sqrt(layer.scale)
                a, b = layer.a[taken].float() * root, layer.b[:, taken].T.float() * root
                ranks = a.shape[0]
                a_page[:ranks], b_page[:ranks] = self._in_range(a), self._in_range(b)
            a_page[ranks:] = 0
            b_page[ranks:] = 0

    def _in_range(self, values: torch.Tensor) -> torch.Tensor:
        """Bound float32 values by what the pages' dtype can hold.

        A page is multiplied with 0 for tokens of other adapters, and 0 times infinity is NaN. The adapter's own rows
        still overflow, and fail by themselves.
        """
        most = torch.finfo(self.dtype).max
        return values.nan_to_num(nan=most).clamp(-most, most)

    def _made(self, group: LayerGroup) -> PageTensors:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, device=self.device, dtype=self.dtype)

        return PageTensors(
            zeros(self.count, len(group.modules) * self.rank, group.inputs), zeros(self.count, self.rank, group.starts[-1])
        )
