"""Trainings that several processes do together, over gloo."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from training.interrupted import processes, train_tiny

from lorafleet.config import Settings
from lorafleet.tasks import Corpus
from lorafleet.training import AdapterCard

PATIENCE_SECONDS = 60


def trained_together(
    corpora: list[Corpus], settings: Settings, folder: Path, on_step: Callable[[int, int], None] | None = None
) -> list[AdapterCard | str]:
    """Train an adapter in as many processes as there are corpora, each given its own: their cards, or what stopped them.

    Args:
        on_step: called in every process with its rank and the step.
    """
    store = folder.parent / "store"
    store.parent.mkdir(exist_ok=True)
    ends = []
    for rank, corpus in enumerate(corpora):
        here, there = processes.Pipe(duplex=False)
        arguments = (rank, len(corpora), store, corpus, settings, folder, on_step, there)
        process = processes.Process(target=_train, args=arguments)
        process.start()
        there.close()
        ends.append((process, here))
    outcomes = []
    for process, here in ends:
        try:
            outcomes.append(here.recv() if here.poll(PATIENCE_SECONDS) else "it hangs")
        except EOFError:
            outcomes.append("it died")
        process.kill()
        process.join()
    store.unlink(missing_ok=True)
    return outcomes


def _train(rank, count, store, corpus, settings, folder, on_step, there) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=PATIENCE_SECONDS / 2),
    )
    try:
        there.send(train_tiny(corpus, settings, folder, lambda step, _: on_step and on_step(rank, step)))
    except Exception as error:
        there.send(f"{type(error).__name__}: {error}")
    distributed.destroy_process_group()
