"""What a worker of a group does: load the base model once, then train adapter after adapter."""

import errno
import logging
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.actor import ActorHandle
from transformers.utils import logging as transformers_logging

from jobs.training.queue import AdapterQueue
from lorafleet.config import Settings
from lorafleet.errors import LoRAFleetError
from lorafleet.training import adapter_name, choose_backend, train_adapter

LONGEST_REASON = 300
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def train_from_queue(config: dict[str, Any]) -> None:
    """Take adapter after adapter from the queue, until it has no more.

    All workers of a group do the same with each adapter; torch's process group, which Ray Train has made for them, holds
    them together, and the first of them tells the queue. A group of several ends with the first error that one of them
    meets: they would be out of step.

    Args:
        config: `settings`, `queue`, and the name of the `group`.
    """
    settings: Settings = config["settings"]
    queue: ActorHandle[AdapterQueue] = config["queue"]
    group: str = config["group"]
    context = ray.train.get_context()
    first, alone = context.get_world_rank() == 0, context.get_world_size() == 1
    ray.get(queue.join.remote(group, ray.get_runtime_context().get_node_id()))
    torch.set_num_threads(max(1, int(settings.training.cpus_per_worker)))
    settings = settings.reserving(settings.training.gpus_per_worker)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if first:
        logging.getLogger("lorafleet").addHandler(_ToQueue(queue))
    model, tokenizer = choose_backend(settings).load(settings)
    turn = 0
    while (taken := ray.get(queue.take.remote(group, turn))) is not None:
        turn += 1
        task, reference = taken
        name = adapter_name(settings, task)
        telling = _Telling(queue, task, first)
        try:
            card = train_adapter(
                model, tokenizer, ray.get(reference), settings, name, Path(settings.adapters) / name, telling.step
            )
        except ray.exceptions.RayActorError:
            # The queue is gone, and with it whoever wants this adapter now; its checkpoints stay.
            return
        except torch.OutOfMemoryError as error:
            if not alone:
                raise
            ray.get(queue.put_off.remote(group, task, reason_of(error, settings)))
        except Exception as error:
            if not alone:
                raise
            ray.get(queue.fail.remote(group, task, reason_of(error, settings)))
        else:
            if first:
                ray.get(queue.done.remote(group, task, card.last_loss))
        # What the shapes of one adapter's batches took is of no use to the next one's, and others may share the GPU.
        torch.cuda.empty_cache()


def reason_of(error: BaseException, settings: Settings) -> str:
    """Why an adapter could not be trained, in one line."""
    text = " ".join(str(error).split())
    # safetensors puts what the system said into words of its own.
    if getattr(error, "errno", None) in FULL or any(f"os error {code}" in text for code in FULL):
        return f"cannot write to {settings.adapters}: {text}. Make room there, and run again: it goes on from its checkpoint"
    return text if isinstance(error, LoRAFleetError) else f"{type(error).__name__}: {text[:LONGEST_REASON]}"


class _Telling:
    """Tells the queue of every step, without waiting; a queue that is gone ends the training."""

    def __init__(self, queue: ActorHandle[AdapterQueue], task: str, first: bool) -> None:
        self._queue, self._task, self._first = queue, task, first
        self._told: ray.ObjectRef[None] | None = None

    def step(self, step: int, loss: float) -> None:
        """An optimiser step was taken."""
        if not self._first:
            return
        if self._told is not None and ray.wait([self._told], timeout=0)[0]:
            ray.get(self._told)
        self._told = self._queue.step.remote(self._task, step, loss)


class _ToQueue(logging.Handler):
    """Tells the queue what a worker warns of: its own log is on its own machine."""

    def __init__(self, queue: ActorHandle[AdapterQueue]) -> None:
        super().__init__(logging.WARNING)
        self._queue = queue

    def emit(self, record: logging.LogRecord) -> None:
        self._queue.warn.remote(record.getMessage())
