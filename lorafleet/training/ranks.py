"""The processes that train one adapter together: torch's default process group, or this process alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import distributed

from lorafleet.errors import TrainingError
from lorafleet.training.rows import TokenRow

Value = TypeVar("Value")
ELSEWHERE = ("another process of the group failed", "Its own message says why")


class Ranks:
    """What the processes share out and tell each other. All of them call the same methods in the same order.

    One that is gone for good is noticed by the group: at once where its connections break, else after the group's timeout.

    Attributes:
        count: how many processes there are.
        rank: which one this is, from 0.
    """

    def __init__(self) -> None:
        together = distributed.is_available() and distributed.is_initialized()
        self.count = distributed.get_world_size() if together else 1
        self.rank = distributed.get_rank() if together else 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, batches: list[list[TokenRow]]) -> list[list[TokenRow]]:
        """This process's part of the rows of a step: as many and as long as the others', in batches no larger than given.

        There is nothing in it where a step has fewer rows than there are processes.
        """
        if self.count == 1:
            return batches
        rows = sorted((row for batch in batches for row in batch), key=len)[self.rank :: self.count]
        size = max(len(batch) for batch in batches)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def add_up(self, tensor: torch.Tensor) -> None:
        """Replace the tensor by its sum over all processes."""
        if self.count > 1:
            distributed.all_reduce(tensor)

    def take_from_first(self, tensor: torch.Tensor) -> None:
        """Replace the tensor by the first process's."""
        if self.count > 1:
            distributed.broadcast(tensor, 0)

    def told_by_first(self, value: Value) -> Value:
        """The first process's value, which can be pickled."""
        if self.count == 1:
            return value
        told = [value]
        distributed.broadcast_object_list(told, 0)
        return told[0]

    def check_same(self, work: Sequence[str]) -> None:
        """Refuse to go on where the processes were given different work.

        Raises:
            TrainingError: they were.
        """
        if self.count == 1:
            return
        all_work: list[Sequence[str]] = [[]] * self.count
        distributed.all_gather_object(all_work, work)
        if any(other != work for other in all_work):
            raise TrainingError(
                f"the {self.count} processes of the group were given different work: {all_work}",
                "Call train_adapter with the same arguments in all of them, or without a default process group",
            )

    @contextmanager
    def agreed(self, device: torch.device) -> Iterator[None]:
        """A block without messages that goes well in every process, or in none.

        Raises:
            TrainingError: it failed in another process.
        """
        votes = torch.zeros(1, device=device) if self.count > 1 else None
        try:
            yield
        except Exception:
            if votes is not None:
                self.add_up(votes + 1)
            raise
        if votes is not None:
            self.add_up(votes)
            if votes.item():
                raise TrainingError(*ELSEWHERE)

    @contextmanager
    def failing_instead_of(self, sums: torch.Tensor) -> Iterator[None]:
        """A block without messages, before `add_up(sums)`: if it fails, the others are told so by a last number of not 0."""
        try:
            yield
        except Exception:
            if self.count > 1:
                sums.zero_()
                sums[-1] = 1
                self.add_up(sums)
            raise
