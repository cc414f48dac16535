"""What a training tells Weights & Biases or TensorBoard: one run for each adapter.

Everything is told from a thread of its own, so that no service that is slow or away holds the training up, or breaks it.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from lorafleet.config import Settings
from lorafleet.training.cards import AdapterCard

PROJECT = "lorafleet"
FIGURES = ("rows", "cut_rows", "steps", "tokens", "first_loss", "last_loss", "seconds")
PATIENCE_SECONDS = 30.0

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where a run's figures go; its methods may be slow, and may fail."""

    def log(self, figures: dict[str, float], step: int) -> None:
        """The figures of a step."""

    def close(self, card: dict[str, Any] | None) -> None:
        """The run ends: with the card of its adapter, or without one."""


class Track:
    """The run of one adapter. Its methods return at once, and never fail.

    Args:
        open_tracker: begins the run; None for no run.
    """

    def __init__(self, open_tracker: Callable[[], Tracker] | None) -> None:
        self._told: SimpleQueue[Callable[[Tracker], None] | None] = SimpleQueue()
        self._card: dict[str, Any] | None = None
        self._thread: threading.Thread | None = None
        if open_tracker is not None:
            self._thread = threading.Thread(target=self._tell, args=(open_tracker,), name="tracking", daemon=True)
            self._thread.start()

    def step(self, number: int, loss: float, learning_rate: float) -> None:
        """An optimiser step was taken."""
        if self._thread is not None:
            figures = {"loss": loss, "learning_rate": learning_rate}
            self._told.put(lambda tracker: tracker.log(figures, number))

    def end(self, card: AdapterCard) -> None:
        """The adapter is in its place."""
        self._card = asdict(card)

    def close(self) -> None:
        """Wait a little, until everything is told."""
        if self._thread is None:
            return
        card = self._card
        self._told.put(lambda tracker: tracker.close(card))
        self._told.put(None)
        self._thread.join(PATIENCE_SECONDS)
        if self._thread.is_alive():
            logger.warning("tracking has not told everything after %g s: training goes on", PATIENCE_SECONDS)

    def _tell(self, open_tracker: Callable[[], Tracker]) -> None:
        try:
            tracker = open_tracker()
            while (telling := self._told.get()) is not None:
                telling(tracker)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning("no tracking of this run any more, training goes on: %s", reason)


@contextmanager
def tracked(settings: Settings, name: str, step: int, here: bool) -> Iterator[Track]:
    """The run of an adapter, as `training.tracking` says.

    Args:
        step: how many steps were taken before.
        here: whether this process is the one that tells.
    """
    folder = settings.state / "tracking"
    openers: dict[str, Callable[[], Tracker]] = {
        "wandb": lambda: _WeightsAndBiases(folder, name, settings),
        "tensorboard": lambda: _TensorBoard(folder / name, step),
    }
    track = Track(openers.get(settings.training.tracking) if here else None)
    try:
        yield track
    finally:
        track.close()


class _TensorBoard:
    """Event files in a folder of the adapter's name; steps that a killed run had taken beyond `step` are purged."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, figure in figures.items():
            self._writer.add_scalar(name, figure, step)

    def close(self, card: dict[str, Any] | None) -> None:
        if card is not None:
            for name in FIGURES:
                self._writer.add_scalar(f"card/{name}", card[name], card["steps"])
        self._writer.close()


class _WeightsAndBiases:
    """A run of the project `lorafleet`; where it goes, and whether online, its own environment says (WANDB_MODE, ...)."""

    def __init__(self, folder: Path, name: str, settings: Settings) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            dir=str(folder),
            config={"base": settings.models.base, **settings.training.model_dump(mode="json")},
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, figures: dict[str, float], step: int) -> None:
        self._run.log(figures, step=step)

    def close(self, card: dict[str, Any] | None) -> None:
        if card is not None:
            self._run.summary.update({name: card[name] for name in FIGURES})
        self._run.finish(exit_code=0 if card is not None else 1)
