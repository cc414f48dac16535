"""The checkpoints of an adapter in training: files beside the adapters, under a name that begins with a dot.

A file is written beside, brought to the disk, and renamed; its name tells whose it is, its step and its digest:
`.training-<adapter>/<fingerprint>-<step>-<digest>.pt`. Two are kept, so that a damaged one costs a few steps and no more.
"""

import hashlib
import logging
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lorafleet.storage import flush

KEPT = 2
PIECE = 1 << 20

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one training.

    Args:
        adapter: the folder where the adapter comes to lie.
        fingerprint: of rows, settings and base model; files with another one are let be until `delete`.
    """

    def __init__(self, adapter: Path, fingerprint: str) -> None:
        self._folder, self._fingerprint = checkpoint_folder(adapter), fingerprint

    def newest(self) -> Path | None:
        """The file that was last written and is whole; None where there is none. Damaged ones are warned of, and deleted."""
        for debris in self._folder.glob(".*"):
            debris.unlink(missing_ok=True)
        for path in self._stored():
            if _is_whole(path):
                return path
            logger.warning("the checkpoint %s is damaged: training goes on from the one before it, or from the start", path)
            path.unlink(missing_ok=True)
        return None

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Keep `state`, plain values and tensors, and the one before it. A full disk is warned of: training goes on."""
        beside = self._folder / f".{uuid.uuid4().hex}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                torch.save(state, file)
            flush(beside)
            beside.replace(self._folder / f"{self._fingerprint}-{step:08d}-{_digest(beside)}.pt")
            flush(self._folder)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            reason = " ".join(str(error).split())
            logger.warning("no checkpoint of step %d in %s, training goes on: %s", step, self._folder, reason)
        for older in self._stored()[KEPT:]:
            older.unlink(missing_ok=True)

    def _stored(self) -> list[Path]:
        """The files of this training, the newest first."""
        return sorted(self._folder.glob(f"{self._fingerprint}-*.pt"), reverse=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What was written there, its tensors on the CPU."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def checkpoint_folder(adapter: Path) -> Path:
    """Where the checkpoints of the adapter lie that comes to lie in `adapter`."""
    return adapter.with_name(f".training-{adapter.name}")


def delete_checkpoints(adapter: Path) -> None:
    """Forget how far any training of the adapter was."""
    shutil.rmtree(checkpoint_folder(adapter), ignore_errors=True)


def _is_whole(path: Path) -> bool:
    try:
        return path.stem.endswith(_digest(path))
    except OSError:
        return False


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
