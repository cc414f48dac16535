"""What the tests of the training job share: small trainings of the tiny model, and looking at what they leave."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from lorafleet.config import Settings
from lorafleet.tasks import load_catalogue, load_corpus
from lorafleet.training import adapter_name, choose_backend, train_adapter
from lorafleet.training.checkpoints import checkpoint_folder

PATIENCE_SECONDS = 240


def place(settings: Settings, task: str) -> Path:
    """Where the adapter of a task comes to lie."""
    return settings.adapters / adapter_name(settings, task)


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def checkpoints_of(settings: Settings, task: str) -> list[Path]:
    return list(checkpoint_folder(place(settings, task)).glob("*.pt"))


def undisturbed(settings: Settings, task: str, folder: Path) -> bytes:
    """The weights as one process trains them that nobody stops."""
    corpus = load_corpus(load_catalogue(settings.tasks)[task], "train", settings.tasks)
    train_adapter(*choose_backend(settings).load(settings), corpus, settings, "name", folder, lambda *_: None)
    return weights(folder)


def written(settings: Settings, path: Path) -> Path:
    """The settings as a file for the job's command line."""
    path.write_text(json.dumps(settings.model_dump(mode="json")))
    return path


def wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def train_workers(below: int | None = None) -> list[psutil.Process]:
    """The worker processes of Ray Train among the descendants of a process, by default of this one."""
    found = []
    for process in psutil.Process(below).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found
