"""The adapters that are to be trained: who has which, how far it is, and what came of it.

Nothing heavy is imported: the actor is there before the workers have torch.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import ray

    from lorafleet.tasks import Corpus

State = Literal["waiting", "training", "saving", "done", "failed"]


@dataclass(frozen=True)
class Standing:
    """How far an adapter is.

    Attributes:
        steps: optimiser steps in all; `step` of them were taken.
        first: the step that the worker which has it now began behind; more than 0 where it took up a checkpoint.
        loss: of the last step's batch; None before the first.
        speed: steps a second; None before there are two to measure it by.
        deaths: how many workers died of it.
    """

    steps: int
    state: State = "waiting"
    step: int = 0
    first: int = 0
    loss: float | None = None
    speed: float | None = None
    deaths: int = 0


@dataclass(frozen=True)
class QueueView:
    """What the queue knows at one moment.

    Attributes:
        standings: by task, in the order in which they are handed out at first.
        groups: which adapters a worker group has in hand, and on which nodes it works.
        warnings: what workers told so far.
        reasons: why there is no adapter, by task.
    """

    standings: dict[str, Standing]
    groups: dict[str, "GroupView"]
    warnings: tuple[str, ...]
    reasons: dict[str, str]

    @property
    def left(self) -> int:
        """Adapters that are neither done nor failed."""
        return sum(standing.state not in ("done", "failed") for standing in self.standings.values())

    @property
    def waiting(self) -> int:
        """Adapters that nobody has in hand."""
        return sum(standing.state == "waiting" for standing in self.standings.values())


@dataclass(frozen=True)
class GroupView:
    """A worker group: the nodes of its workers (Ray's ids), what it has in hand, and how many adapters it was given."""

    nodes: tuple[str, ...]
    in_hand: tuple[str, ...]
    taken: int


@dataclass
class _Group:
    nodes: set[str] = field(default_factory=set)
    turns: list[str] = field(default_factory=list)
    in_hand: list[str] = field(default_factory=list)


class AdapterQueue:
    """Hands out tasks, and keeps what came of each. A Ray actor on the driver's node.

    Args:
        corpora: references of the rows, by task, in the order in which they are to be handed out.
        steps: optimiser steps of each.
        deaths_allowed: how many workers may die of an adapter before it is given up; -1 for any number.
    """

    def __init__(
        self, corpora: "Mapping[str, ray.ObjectRef[Corpus]]", steps: Mapping[str, int], deaths_allowed: int
    ) -> None:
        self._corpora = dict(corpora)
        self._deaths_allowed = deaths_allowed
        self._waiting = list(corpora)
        self._standings = {task: Standing(steps[task]) for task in corpora}
        self._measured_from: dict[str, tuple[float, int]] = {}
        self._groups: dict[str, _Group] = {}
        self._reasons: dict[str, str] = {}
        self._warnings: list[str] = []
        self._put_off: set[str] = set()

    def join(self, group: str, node: str) -> None:
        """A worker of a group begins on a node."""
        self._group(group).nodes.add(node)

    def take(self, group: str, turn: int) -> "tuple[str, ray.ObjectRef[Corpus]] | None":
        """The task of a group's `turn` (from 0), the same for each of its workers; None when there is no more."""
        this = self._group(group)
        if turn == len(this.turns):
            if not self._waiting:
                return None
            task = self._waiting.pop(0)
            this.turns.append(task)
            this.in_hand.append(task)
            self._standings[task] = replace(self._standings[task], state="training", step=0, first=0, speed=None)
        return this.turns[turn], self._corpora[this.turns[turn]]

    def step(self, task: str, step: int, loss: float) -> None:
        """A worker took an optimiser step."""
        before = self._standings[task]
        if before.state != "training":
            # A word of a worker that has died since.
            return
        now = time.monotonic()
        if before.step == 0:
            before = replace(before, first=step - 1)
            self._measured_from[task] = (now, step)
        began, began_step = self._measured_from[task]
        speed = (step - began_step) / (now - began) if step > began_step and now > began else None
        state: State = "saving" if step == before.steps else "training"
        self._standings[task] = replace(before, state=state, step=step, loss=loss, speed=speed)

    def done(self, group: str, task: str, loss: float) -> None:
        """A group's adapter is whole, and in its place; `loss` is the last."""
        self._give_back(group, task)
        standing = self._standings[task]
        self._standings[task] = replace(standing, state="done", step=standing.steps, loss=loss)

    def fail(self, group: str, task: str, reason: str) -> None:
        """A group's adapter cannot be trained."""
        self._give_back(group, task)
        self._give_up(task, reason)

    def put_off(self, group: str, task: str, reason: str) -> None:
        """A group had no memory for an adapter: it waits behind the others, which may share the GPU no more by then.

        The second time it is given up.
        """
        if task in self._put_off:
            self.fail(group, task, reason)
            return
        self._put_off.add(task)
        self._give_back(group, task)
        self._standings[task] = replace(self._standings[task], state="waiting")
        self._waiting.append(task)
        self.warn(f"{task} waits behind the others, and is tried again: {reason}")

    def warn(self, warning: str) -> None:
        """A worker tells something that the user should know."""
        self._warnings.append(warning)

    def leave(self, group: str, reason: str, blameless: bool) -> None:
        """A group has ended: what it had in hand waits again, or is given up where too many workers died of it.

        Args:
            reason: what it ended of.
            blameless: its node went away: the adapter had no part in it, and is next in turn. Else it waits behind those
                that may do no harm.
        """
        ended = self._groups.pop(group, _Group())
        for task in ended.in_hand:
            self._standings[task] = replace(self._standings[task], state="waiting")
            self._waiting.insert(0 if blameless else len(self._waiting), task)
            if not blameless:
                self.blame(task, reason)

    def blame(self, task: str, reason: str) -> None:
        """A worker died of an adapter; where it waits, and too many did, it is given up."""
        standing = self._standings[task]
        deaths = standing.deaths + 1
        self._standings[task] = replace(standing, deaths=deaths)
        if task in self._waiting and 0 <= self._deaths_allowed < deaths:
            self._waiting.remove(task)
            times = "once" if deaths == 1 else f"{deaths} times"
            self._give_up(task, f"its worker died {times}, the last time of: {reason}")

    def abandon(self, reason: str) -> None:
        """Nothing can be trained any more: what waits fails for the same reason."""
        while self._waiting:
            self._give_up(self._waiting.pop(), reason)

    def view(self) -> QueueView:
        """Where the work stands."""
        groups = {
            name: GroupView(tuple(group.nodes), tuple(group.in_hand), len(group.turns))
            for name, group in self._groups.items()
        }
        return QueueView(dict(self._standings), groups, tuple(self._warnings), dict(self._reasons))

    def _group(self, name: str) -> _Group:
        return self._groups.setdefault(name, _Group())

    def _give_back(self, group: str, task: str) -> None:
        self._group(group).in_hand.remove(task)

    def _give_up(self, task: str, reason: str) -> None:
        self._reasons[task] = reason
        self._standings[task] = replace(self._standings[task], state="failed")
