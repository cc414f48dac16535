"""Worker groups: each one a Ray Train run of its own, so that one that dies takes no other with it.

A group is `training.workers_per_adapter` workers with a process group of torch between them. It takes adapter after adapter
from the queue. Groups are started while there is work that waits and room in the cluster, and so also on nodes that join;
those that die are replaced, for as long as there is room.
"""

import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

import ray
import ray.train
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from jobs.cluster import cause_of
from jobs.training import room
from jobs.training.queue import AdapterQueue, GroupView, QueueView
from jobs.training.work import reason_of, train_from_queue
from lorafleet.config import Settings
from lorafleet.errors import LoRAFleetError
from lorafleet.training.ranks import ELSEWHERE

END_SECONDS = 30.0
# Ray takes a node for dead after half a minute without a sign of life.
DOUBT_SECONDS = 60.0
FALSE_STARTS = 3
# Set where nobody has: the watcher is one more process for every group, which has no other use for it; the end of a worker
# is seen in half a second instead of two.
RAY_TRAIN = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}


class WorkerGroup(threading.Thread):
    """One Ray Train run, from a thread of the driver: its controller lives on the driver's node, which cannot leave.

    Attributes:
        error: what it ended of; None where it ended well, or has not ended.
    """

    def __init__(self, name: str, trainer: TorchTrainer) -> None:
        super().__init__(name=name, daemon=True)
        self.error: Exception | None = None
        self._trainer = trainer

    def run(self) -> None:
        """Train until the queue is empty, or a worker dies."""
        try:
            self._trainer.fit()
        except Exception as error:
            self.error = error


@dataclass(frozen=True)
class _Doubt:
    """A group whose workers could no longer be reached: that its node has died is known somewhat later."""

    until: float
    nodes: tuple[str, ...]
    tasks: tuple[str, ...]
    reason: str


class WorkerGroups:
    """Keeps as many groups running as there is work and room for."""

    def __init__(self, settings: Settings, queue: ActorHandle[AdapterQueue]) -> None:
        for name, value in RAY_TRAIN.items():
            os.environ.setdefault(name, value)
        self._settings, self._queue = settings, queue
        self._numbers = count(1)
        self._running: list[WorkerGroup] = []
        self._doubts: list[_Doubt] = []
        self._false_starts = 0
        self._unfit_places = 0
        self._last_reason = ""

    @property
    def running(self) -> int:
        """Groups that have not ended."""
        return len(self._running)

    def tend(self, view: QueueView) -> None:
        """See which groups have ended, and start as many as there is work and room for."""
        ended = [group for group in self._running if not group.is_alive()]
        self._running = [group for group in self._running if group.is_alive()]
        if ended:
            # What they took since they were last looked at is theirs, too.
            view = ray.get(self._queue.view.remote())
        for group in ended:
            self._take_leave(group, view)
        self._settle_doubts()
        if not ended:
            self._start(view)

    def end(self, view: QueueView) -> None:
        """Wait for the groups that have begun: with no work left, they end by themselves."""
        for group in self._running:
            if group.name in view.groups:
                group.join(END_SECONDS)

    def join(self) -> None:
        """Wait for all groups, once there is no queue: a thread that is in a call of Ray's while the driver exits ends it
        with exit code 1, whatever came of the training.
        """
        until = time.monotonic() + END_SECONDS
        for group in self._running:
            group.join(max(0.0, until - time.monotonic()))

    def _start(self, view: QueueView) -> None:
        """Start groups for the adapters that no group is about to take."""
        places = room.groups_in_all(self._settings.training) - self._unfit_places
        if places < 1 and self._unfit_places and not self._running:
            ray.get(self._queue.abandon.remote(f"no worker can begin: {self._last_reason}"))
            return
        beginning = sum(group.name not in view.groups for group in self._running)
        idle = sum(not view.groups[group.name].in_hand for group in self._running if group.name in view.groups)
        wanted = min(places - len(self._running), view.waiting - beginning - idle)
        if wanted < 1:
            return
        # Those that are beginning may not have their room yet.
        for _ in range(min(wanted, room.groups_now(self._settings.training) - beginning)):
            group = self._group(f"group-{next(self._numbers)}")
            group.start()
            self._running.append(group)

    def _group(self, name: str) -> WorkerGroup:
        training = self._settings.training
        together = training.workers_per_adapter > 1
        # NCCL wants a GPU for each worker; gloo also lets several share one, which have nothing to say to each other.
        backend = "nccl" if together and training.gpus_per_worker >= 1 else "gloo"
        trainer = TorchTrainer(
            train_from_queue,
            train_loop_config={"settings": self._settings, "queue": self._queue, "group": name},
            scaling_config=ScalingConfig(
                num_workers=training.workers_per_adapter,
                use_gpu=training.gpus_per_worker > 0,
                resources_per_worker=room.worker_resources(training),
            ),
            torch_config=TorchConfig(backend=backend),
            run_config=RunConfig(
                name=name,
                storage_path=str(self._settings.state / "ray_train"),
                # Whether, where and with which adapter it goes on, is ours to say.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            ),
        )
        return WorkerGroup(name, trainer)

    def _take_leave(self, group: WorkerGroup, view: QueueView) -> None:
        """Tell the queue that a group has ended, and judge of what."""
        begun = view.groups.get(group.name, GroupView((), (), 0))
        cause = _cause(group.error)
        reason = reason_of(cause, self._settings) if cause is not None else ""
        blameless = cause is None or isinstance(group.error, ray.train.PreemptionError) or self._any_gone(begun.nodes)
        if begun.taken:
            self._false_starts = 0
            if not blameless and _is_final(cause):
                # It would end the same way again.
                for task in begun.in_hand:
                    ray.get(self._queue.fail.remote(group.name, task, reason))
        elif not blameless and not isinstance(cause, WorkerGroupStartupTimeoutError):
            self._false_start(cause, reason)
        if isinstance(cause, ActorUnavailableError) and not blameless:
            self._doubts.append(_Doubt(time.monotonic() + DOUBT_SECONDS, begun.nodes, begun.in_hand, reason))
            blameless = True
        ray.get(self._queue.leave.remote(group.name, reason, blameless))

    def _false_start(self, cause: BaseException | None, reason: str) -> None:
        """A group has ended before it was given anything: no adapter is at fault. Too often, and its place is given up."""
        self._last_reason = reason
        self._false_starts += 1
        if isinstance(cause, LoRAFleetError) or self._false_starts > FALSE_STARTS:
            self._unfit_places += 1

    def _settle_doubts(self) -> None:
        """Blame the adapters of groups that ended for reasons unknown, if their nodes are still there by now."""
        due = [doubt for doubt in self._doubts if doubt.until <= time.monotonic()]
        self._doubts = [doubt for doubt in self._doubts if doubt not in due]
        for doubt in due:
            if not self._any_gone(doubt.nodes):
                for task in doubt.tasks:
                    ray.get(self._queue.blame.remote(task, doubt.reason))

    def _any_gone(self, there: Iterable[str]) -> bool:
        alive = {node.identifier for node in room.nodes(self._settings.training)}
        return not alive.issuperset(there)


def _cause(error: Exception | None) -> BaseException | None:
    """What a worker, or Ray Train itself, met: of several workers' errors one that does not speak of another's."""
    if error is None:
        return None
    failures = getattr(error, "worker_failures", None) or {0: getattr(error, "controller_failure", error)}
    causes = [cause_of(getattr(failure, "health_check_failure", failure)) for failure in failures.values()]
    return next((cause for cause in causes if not _speaks_of_another(cause)), causes[0])


def _speaks_of_another(cause: BaseException) -> bool:
    return isinstance(cause, LoRAFleetError) and cause.problem == ELSEWHERE[0]


def _is_final(cause: BaseException | None) -> bool:
    return isinstance(cause, LoRAFleetError) and not _speaks_of_another(cause)
