"""Keys and values in pages, and attention over them by a Triton kernel: for GPUs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PretrainedConfig

from lorafleet.engine.attention import Attention, Manner
from lorafleet.engine.paged_attention import Branches, QueryBlocks, paged_attention, store_, tokens_of
from lorafleet.engine.segments import Segment
from lorafleet.errors import ModelError

PAGE_TOKENS = 16
DECODE_ROWS = 16
PREFILL_ROWS = 64
Pages = tuple[int, ...]


class PagedCache:
    """A fixed number of pages of 16 tokens; a sequence holds those that its tokens need, wherever they lie.

    Args:
        memory: bytes for keys and values.
        longest: tokens of a sequence, at most.

    Raises:
        ModelError: not even one sequence of that length fits into the memory.
    """

    def __init__(
        self, config: PretrainedConfig, memory: int, longest: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        text = config.get_text_config()
        self.heads = int(text.num_attention_heads)
        self.cache_heads = int(getattr(text, "num_key_value_heads", None) or self.heads)
        head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // self.heads)
        shape = (self.cache_heads, PAGE_TOKENS, head_dim)
        layers = int(text.num_hidden_layers)
        page_bytes = 2 * layers * self.cache_heads * PAGE_TOKENS * head_dim * dtype.itemsize
        count = memory // page_bytes
        if count * PAGE_TOKENS < longest:
            raise ModelError(
                f"there is room for the keys and values of {count * PAGE_TOKENS} tokens, a sequence may have {longest}",
                "Lower generation.longest, raise generation.cache_gib, or free memory of the GPU",
            )
        self._longest, self.device = longest, device
        self.keys = [torch.empty(count, *shape, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.empty(count, *shape, device=device, dtype=dtype) for _ in range(layers)]
        self._free = list(range(count))[::-1]

    @property
    def longest(self) -> int:
        """The most tokens a sequence may have."""
        return self._longest

    @property
    def widest(self) -> int:
        """The most pages a sequence may have."""
        return -(-self._longest // PAGE_TOKENS)

    @property
    def bytes(self) -> int:
        """Memory taken."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    @property
    def block_tokens(self) -> int:
        """Tokens of a query block of a pass over prompts."""
        return max(tokens_of(PREFILL_ROWS, self.heads, self.cache_heads), 1)

    def reserve(self, tokens: int, passing: bool = False) -> Pages | None:
        """As many pages as the tokens need."""
        assert tokens <= self._longest
        needed = -(-tokens // PAGE_TOKENS)
        if needed > len(self._free):
            return None
        return tuple(self._free.pop() for _ in range(needed))

    def release(self, room: Pages) -> None:
        """Free pages."""
        self._free.extend(room)

    def prefill(self, segments: Sequence[Segment[Pages]]) -> Attention:
        """All segments in one launch, cut into blocks of their tokens."""
        slots = [slots_of(segment.room, np.arange(segment.past, segment.past + len(segment.tokens))) for segment in segments]
        branches = None
        if any(segment.options for segment in segments):
            # The prompt's own tokens share nothing: they see the keys before them as they lie, and have windows over those.
            shared = [
                np.repeat([0, segment.shared], [segment.shared - segment.past, sum(segment.options)]) for segment in segments
            ]
            branch = [np.array(segment.branches()) for segment in segments]
            branches = Branches(self._on_device(np.concatenate(shared)), self._on_device(np.concatenate(branch)))
        return PagedAttention(
            self,
            self._on_device(np.concatenate(slots)),
            self._on_device(tables_of([segment.room for segment in segments])),
            QueryBlocks(PREFILL_ROWS, *self._on_device(query_blocks(segments, self.block_tokens))),
            branches,
        )

    def decode(self, rooms: Sequence[Pages], pasts: Sequence[int]) -> Attention:
        """One token of every row."""
        places = np.array(pasts)
        slots = np.concatenate([slots_of(room, places[row : row + 1]) for row, room in enumerate(rooms)])
        rows = np.arange(len(rooms))
        queries = self._on_device(np.stack([rows, rows, np.ones_like(rows), places]))
        return PagedAttention(
            self, self._on_device(slots), self._on_device(tables_of(rooms)), QueryBlocks(DECODE_ROWS, *queries)
        )

    def _on_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)).to(self.device, non_blocking=True)


@dataclass(frozen=True)
class PagedAttention:
    """The attention of one pass.

    Attributes:
        slots: int32 [tokens], where each token's key and value go: page * PAGE_TOKENS + offset; -1 for nowhere.
        tables: int32 [rows, pages of the longest row], the pages of each sequence in their order.
    """

    cache: PagedCache
    slots: torch.Tensor
    tables: torch.Tensor
    queries: QueryBlocks
    branches: Branches | None = None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, manner: Manner
    ) -> torch.Tensor:
        """Store, then attend."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        store_(_by_token(key), _by_token(value), keys, values, self.slots)
        attended = paged_attention(
            _by_token(query),
            keys,
            values,
            self.tables,
            self.queries,
            manner.scale,
            manner.window,
            manner.softcap,
            self.branches,
        )
        return attended[None]


def query_blocks(segments: Sequence[Segment[Pages]], size: int) -> np.ndarray:
    """Segments cut into blocks of at most `size` tokens, int32 [4, blocks]: row, first, count and key of `QueryBlocks`."""
    blocks, start = [], 0
    for row, segment in enumerate(segments):
        count = len(segment.tokens)
        blocks += [(row, start + first, min(size, count - first), segment.past + first) for first in range(0, count, size)]
        start += count
    return np.array(blocks, dtype=np.int32).T


def slots_of(room: Pages, places: np.ndarray) -> np.ndarray:
    """Where the tokens at some places of a sequence go, int64 [n]."""
    slots: np.ndarray = np.array(room)[places // PAGE_TOKENS] * PAGE_TOKENS + places % PAGE_TOKENS
    return slots


def tables_of(rooms: Sequence[Pages]) -> np.ndarray:
    """The pages of each sequence, int32 [rows, pages of the longest], padded with 0."""
    tables = np.zeros((len(rooms), max(map(len, rooms))), dtype=np.int32)
    for row, room in enumerate(rooms):
        tables[row, : len(room)] = room
    return tables


def _by_token(tensor: torch.Tensor) -> torch.Tensor:
    """[1, heads, tokens, head_dim] as [tokens, heads, head_dim], a token's values together."""
    by_token = tensor[0].transpose(0, 1)
    _, heads, head_dim = by_token.shape
    together = by_token.stride(2) == 1 and (heads == 1 or by_token.stride(1) == head_dim)
    return by_token if together else by_token.contiguous()
