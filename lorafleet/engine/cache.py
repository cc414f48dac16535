"""Where keys and values are kept, and the attention over them: what every cache offers."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from lorafleet.engine.attention import Attention
from lorafleet.engine.segments import Segment

Room = TypeVar("Room")


class KeyValueCache(Protocol[Room]):
    """Room for the keys and values of sequences, within a limit of memory.

    A sequence reserves all it may need when it begins, so that one that has begun can always be finished.
    """

    @property
    def longest(self) -> int:
        """The most tokens a sequence may have, prompt and answer together."""

    @property
    def bytes(self) -> int:
        """Memory taken."""

    def reserve(self, tokens: int, passing: bool = False) -> Room | None:
        """Room for a sequence of at most so many tokens, at most `longest`; None while others take it.

        Args:
            passing: the sequence lives for one pass.
        """

    def release(self, room: Room) -> None:
        """Give room back."""

    def prefill(self, segments: Sequence[Segment[Room]]) -> Attention:
        """The attention of a pass over these segments."""

    def decode(self, rooms: Sequence[Room], pasts: Sequence[int]) -> Attention:
        """The attention of a pass over one more token of each of these sequences."""
