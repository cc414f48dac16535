"""What a pass computes: runs of tokens, each of one sequence under one composition."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from lorafleet.composition import Lease

PASS_PROMPTS = 64
"""Segments of prompts in a pass at most: a CUDA graph has places for them."""
Room = TypeVar("Room")


@dataclass(frozen=True)
class Segment(Generic[Room]):
    """Tokens of one sequence, behind those that were computed before.

    Attributes:
        tokens: their ids.
        past: how many tokens of the sequence are in the cache.
        room: where the sequence's keys and values are kept.
        lease: the composition's.
        wanted: the places, in `tokens`, whose logits are wanted.
        options: lengths of the answers at the end of `tokens`: each continues what is before them all, and sees
            nothing of the others.
    """

    tokens: Sequence[int]
    past: int
    room: Room
    lease: Lease | None
    wanted: Sequence[int]
    options: tuple[int, ...] = ()

    @property
    def shared(self) -> int:
        """How many keys all options see."""
        return self.past + len(self.tokens) - sum(self.options)

    def branches(self) -> list[int]:
        """Of each token: the key at which its own option begins, 0 for what all options share."""
        starts = [0] * (len(self.tokens) - sum(self.options))
        begin = self.shared
        for length in self.options:
            starts += [begin] * length
            begin += length
        return starts

    def positions(self) -> list[int]:
        """Of each token: its place in the text that it belongs to."""
        places = list(range(self.past, self.shared))
        for length in self.options:
            places += range(self.shared, self.shared + length)
        return places


def visible(segment: Segment[Room], window: int, device: torch.device) -> torch.Tensor:
    """Which keys each token of a segment sees, bool [tokens, past + tokens]."""
    total = segment.past + len(segment.tokens)
    keys = torch.arange(total, device=device)
    places = torch.arange(segment.past, total, device=device)[:, None]
    seen = keys <= places
    if segment.options:
        branches = torch.tensor(segment.branches(), device=device)[:, None]
        seen &= (keys < segment.shared) | (keys >= branches)
    if window:
        texts = torch.cat([torch.arange(segment.past, device=device), torch.tensor(segment.positions(), device=device)])
        seen &= texts[segment.past :, None] - texts < window
    return seen
