"""What tests hand to the engine to hear an answer's pieces, and to act in the middle of its work."""

import threading
from collections.abc import Callable

from lorafleet.engine import Piece

PATIENCE = 60
"""Seconds; only a fault makes anybody wait so long."""


class Listener:
    """Keeps the pieces, and does something once: in the engine's thread, behind the pass that gave the piece `at`."""

    def __init__(self, at: int = 0, do: Callable[[], object] = lambda: None) -> None:
        self.pieces: list[Piece] = []
        self._at, self._do = at, do

    def __call__(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if len(self.pieces) == self._at:
            self._do()

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(piece.choice.token for piece in self.pieces if piece.choice is not None)


class Gate:
    """Stops the engine at the first piece of an answer, until it is opened."""

    def __init__(self) -> None:
        self._reached, self._opened = threading.Event(), threading.Event()

    def __call__(self, piece: Piece) -> None:
        self._reached.set()
        assert self._opened.wait(PATIENCE)

    def reached(self) -> None:
        assert self._reached.wait(PATIENCE)

    def open(self) -> None:
        self._opened.set()
