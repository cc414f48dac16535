"""Trainings in processes of their own, which end by SIGKILL in the middle of what they do."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_language_model import tiny_model, tiny_tokenizer

from lorafleet.config import Settings
from lorafleet.tasks import Corpus
from lorafleet.training import AdapterCard, train_adapter

FILE_EVENTS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}

# A process forked from a server that has the packages loaded already starts in milliseconds.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["lorafleet.training"])


class Stopped(BaseException):
    """What ends a training from outside."""


def stop_at(last: int) -> Callable[[int, float], None]:
    """What ends it after a step."""

    def on_step(step: int, loss: float) -> None:
        if step == last:
            raise Stopped

    return on_step


def train_tiny(
    corpus: Corpus, settings: Settings, folder: Path, on_step: Callable[[int, float], None] = lambda *_: None
) -> AdapterCard:
    """Train an adapter on the tiny model, as it always is at the start."""
    return train_adapter(tiny_model(), tiny_tokenizer(), corpus, settings, "name", folder, on_step)


def killed_at_file_event(corpus: Corpus, settings: Settings, folder: Path, number: int) -> bool:
    """Train in another process that is killed before its `number`-th change of a file below `folder`'s parent.

    Returns:
        Whether it was; False where it was through before.
    """
    process = processes.Process(target=_train_and_die, args=(corpus, settings, folder, number))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def _train_and_die(corpus: Corpus, settings: Settings, folder: Path, number: int) -> None:
    torch.set_num_threads(1)
    below = str(folder.parent)
    seen = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event not in FILE_EVENTS or not str(arguments[0]).startswith(below):
            return
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    train_tiny(corpus, settings, folder)
