"""Which adapter pages every block of tokens reads, and how much of each every token takes."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BlockTable:
    """The compositions of a batch, for the kernels: tokens in blocks, and for every block its entries, one a page it reads.

    Every token belongs to one block. Blocks that begin where a prompt begins read the pages of one composition alone, and
    cost less than blocks that two prompts share. The entries of a block lie together, in the order of their position. All
    tensors lie on the device; their addresses and shapes stay while a CUDA graph that has captured them lives, their
    contents may change between replays.

    Attributes:
        block: the most tokens that a block holds (16, 32, 64 or 128).
        positions: pages of the widest adapter; page p of an adapter holds its ranks p * rank to (p + 1) * rank.
        bounds: int32 [blocks + 1]; block t holds the tokens from bounds[t] to bounds[t + 1].
        entry_page: int32 [capacity], the page of each entry; what lies behind the last entry in use is never read.
        starts: int32 [blocks * positions + 1]; the entries of block t and position p are those from
            starts[t * positions + p] to starts[t * positions + p + 1].
        sums: int32 [blocks]; 0 where no token of the block gathers.
        direct: float32 [capacity, block]; what each token takes of the entry's own ranks.
        gather: float32 [capacity, block]; with what each token adds the entry's ranks to its sum over the position.
        spread: float32 [capacity, block]; what each token takes of that sum for the entry.
    """

    block: int
    positions: int
    bounds: Tensor
    entry_page: Tensor
    starts: Tensor
    sums: Tensor
    direct: Tensor
    gather: Tensor
    spread: Tensor

    @property
    def blocks(self) -> int:
        """How many blocks the table has room for."""
        return self.sums.shape[0]

    @property
    def capacity(self) -> int:
        """How many entries the table has room for."""
        return self.entry_page.shape[0]
