"""Keys and values in slots, one a sequence, and attention in plain torch: for CPUs, and GPUs without Triton."""

import heapq
from collections.abc import Sequence
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from lorafleet.engine.attention import Attention, Manner
from lorafleet.engine.segments import Segment, visible

SMALLEST_SPAN = 128
NOWHERE = -1


class SlottedCache:
    """Slots of one length. They are made as long as the sequences that come need, and never longer than `longest`.

    Args:
        slots: sequences at once.
        longest: tokens of a sequence, at most.
    """

    def __init__(self, slots: int, longest: int, device: torch.device) -> None:
        self._longest, self._slots, self._device = longest, slots, device
        self._free = list(range(slots))
        self._reserved = [0] * slots
        self._span = min(SMALLEST_SPAN, longest)
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}

    @property
    def longest(self) -> int:
        """The most tokens a sequence may have."""
        return self._longest

    @property
    def bytes(self) -> int:
        """Memory taken."""
        return sum(tensor.nbytes for kept in (self._keys, self._values) for tensor in kept.values())

    def reserve(self, tokens: int, passing: bool = False) -> int | None:
        """The lowest free slot; what lives for one pass needs none."""
        assert tokens <= self._longest
        if passing:
            return NOWHERE
        if not self._free:
            return None
        while self._span < tokens:
            self._span = min(2 * self._span, self._longest)
        slot = heapq.heappop(self._free)
        self._reserved[slot] = tokens
        return slot

    def release(self, room: int) -> None:
        """Free a slot. What lies in it is masked for the next one, and so has to be numbers: NaN is NaN under a mask too."""
        if room != NOWHERE:
            for kept in (*self._keys.values(), *self._values.values()):
                kept[room, :, : self._reserved[room]].zero_()
            heapq.heappush(self._free, room)

    def prefill(self, segments: Sequence[Segment[int]]) -> Attention:
        """Each segment attends by itself."""
        return _Prefill(self, segments, self._device)

    def decode(self, rooms: Sequence[int], pasts: Sequence[int]) -> Attention:
        """All rows attend in one call, over the slots as they lie."""
        return _Decode(self, rooms, pasts, self._device)

    def layer(self, number: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values, [slots, key heads, span, head_dim]; made, or made longer, where need be."""
        for kept in (self._keys, self._values):
            old = kept.get(number)
            if old is None or old.shape[2] < self._span:
                new = like.new_zeros(self._slots, like.shape[1], self._span, like.shape[3])
                if old is not None:
                    new[:, :, : old.shape[2]] = old
                kept[number] = new
        return self._keys[number], self._values[number]


class _Prefill:
    def __init__(self, cache: SlottedCache, segments: Sequence[Segment[int]], device: torch.device) -> None:
        self._cache, self._segments, self._device = cache, segments, device
        self._masks: dict[tuple[int, int], torch.Tensor | None] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, manner: Manner
    ) -> torch.Tensor:
        keys, values = self._cache.layer(layer, key)
        outputs, start = [], 0
        for number, segment in enumerate(self._segments):
            own = slice(start, start + len(segment.tokens))
            end = segment.past + len(segment.tokens)
            if segment.room != NOWHERE:
                keys[segment.room, :, segment.past : end] = key[0, :, own]
                values[segment.room, :, segment.past : end] = value[0, :, own]
            seen = (keys[None, segment.room, :, :end], values[None, segment.room, :, :end]) if segment.past else None
            outputs.append(
                _attention(
                    query[:, :, own], *(seen or (key[:, :, own], value[:, :, own])), self._mask(number, manner), manner
                )
            )
            start = own.stop
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def _mask(self, number: int, manner: Manner) -> torch.Tensor | None:
        """Which keys a segment's tokens see; None where it is all before them."""
        if (number, manner.window) not in self._masks:
            segment = self._segments[number]
            plain = not segment.past and not segment.options and not 0 < manner.window < len(segment.tokens)
            mask = None if plain and not manner.softcap else visible(segment, manner.window, self._device)
            self._masks[number, manner.window] = mask
        return self._masks[number, manner.window]


class _Decode:
    def __init__(self, cache: SlottedCache, rooms: Sequence[int], pasts: Sequence[int], device: torch.device) -> None:
        self._cache, self._device = cache, device
        self._slots, self._longest = max(rooms) + 1, max(pasts) + 1
        # Free slots among the rows are computed along, and their answers dropped: that costs less than moving keys.
        self._dense = list(rooms) == list(range(self._slots))
        self._rooms = torch.tensor(rooms, device=device)
        self._pasts = torch.tensor(pasts, device=device)
        self._masks: dict[int, torch.Tensor] = {}
        self._places: dict[tuple[int, int], torch.Tensor] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, manner: Manner
    ) -> torch.Tensor:
        keys, values = self._cache.layer(layer, key)
        heads, head_dim = key.shape[1], query.shape[-1]
        lines = self._lines(heads, keys.shape[2])
        for kept, new in ((keys, key), (values, value)):
            kept.view(-1, head_dim).index_copy_(0, lines, new[0].transpose(0, 1).reshape(-1, head_dim))
        # The query heads that share a key head stand in the place of tokens: they all see the same keys.
        rows = query[0].transpose(0, 1).reshape(query.shape[2], heads, -1, head_dim)
        if not self._dense:
            rows = rows.new_zeros(self._slots, *rows.shape[1:]).index_copy(0, self._rooms, rows)
        keys, values = keys[: self._slots, :, : self._longest], values[: self._slots, :, : self._longest]
        output = _attention(rows, keys, values, self._mask(manner.window), manner)
        if not self._dense:
            output = output[self._rooms]
        return output.reshape(1, query.shape[2], query.shape[1], head_dim)

    def _lines(self, heads: int, span: int) -> torch.Tensor:
        """Where the new keys go among all of a layer, one head's behind the other, int64 [rows * heads]."""
        if (heads, span) not in self._places:
            lines = (self._rooms[:, None] * heads + torch.arange(heads, device=self._device)) * span
            self._places[heads, span] = (lines + self._pasts[:, None]).flatten()
        return self._places[heads, span]

    def _mask(self, window: int) -> torch.Tensor:
        """Which keys each slot sees, bool [slots, 1, 1, keys]; a free slot sees the first."""
        if window not in self._masks:
            places = self._pasts.new_zeros(self._slots).index_copy(0, self._rooms, self._pasts)[:, None]
            keys = torch.arange(self._longest, device=self._device)
            seen = keys <= places
            if window:
                seen &= places - keys < window
            self._masks[window] = seen[:, None, None]
        return self._masks[window]


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, manner: Manner
) -> torch.Tensor:
    """Attention over [rows, heads, tokens, head_dim]; without a mask, causal."""
    grouped = query.shape[1] != key.shape[1]
    if not manner.softcap:
        attend = partial(scaled_dot_product_attention, scale=manner.scale, enable_gqa=grouped)
        return attend(query, key, value, attn_mask=mask, is_causal=mask is None)
    if grouped:
        key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(-2, -1)).float() * manner.scale
    scores = manner.softcap * torch.tanh(scores / manner.softcap)
    assert mask is not None
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return weights.to(value.dtype) @ value
