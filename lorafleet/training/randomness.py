"""The random numbers of a training: they depend on its seed alone, and can be put down and taken up again."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy
import torch


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed Python's, numpy's and torch's random numbers; afterwards the caller's go on as if nothing had been drawn."""
    of_python, of_numpy = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(of_python)
            numpy.random.set_state(of_numpy)


def random_state(device: torch.device) -> dict[str, Any]:
    """Where the random numbers stand, as plain values and tensors; those of `device` too where it is a GPU."""
    name, keys, *rest = cast(tuple[Any, ...], numpy.random.get_state())
    return {
        "python": random.getstate(),
        "numpy": (name, torch.tensor(keys.astype("int64")), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on with the random numbers that `random_state` gave."""
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
