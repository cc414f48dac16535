"""From a plan to the cards of its adapters: a queue, worker groups, and a table of how it goes."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import typer
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.training.groups import WorkerGroups
from jobs.training.plan import Plan
from jobs.training.queue import AdapterQueue, QueueView
from jobs.training.table import Watch, watch
from lorafleet.config import Settings
from lorafleet.training import AdapterCard, adapter_name, read_card, sweep

POLL_SECONDS = 0.5


def fan_out(settings: Settings, plan: Plan) -> tuple[dict[str, AdapterCard], dict[str, str]]:
    """Train the adapters of a plan on the cluster that this process has joined.

    Returns:
        The cards, and the reasons why there is none, by task.

    Raises:
        KeyboardInterrupt: Ctrl-C, or SIGTERM, as `ray job stop` sends it: what is done is kept, and what was begun can be
            gone on with.
    """
    queue = _queue(settings, plan)
    groups = WorkerGroups(settings, queue)
    try:
        with _stoppable(), watch(settings, plan) as table:
            _supervise(queue, groups, table)
        view: QueueView = ray.get(queue.view.remote())
    except KeyboardInterrupt:
        _say_what_stays(queue)
        raise
    finally:
        # Workers that still train notice it after their step, and end.
        ray.kill(queue)
        groups.join()
    return _outcome(settings, view)


def _outcome(settings: Settings, view: QueueView) -> tuple[dict[str, AdapterCard], dict[str, str]]:
    """The cards as they lie beside the adapters, and the reasons why there is none, by task."""
    cards, reasons = {}, dict(view.reasons)
    for task, standing in view.standings.items():
        folder = settings.adapters / adapter_name(settings, task)
        # A worker that was killed leaves what it was writing.
        sweep(folder)
        if standing.state != "done":
            continue
        card = read_card(folder)
        if card is None:
            reasons[task] = f"it was trained, and is not to be seen here in {folder}. Give a --state that all machines share"
        else:
            cards[task] = card
    return cards, reasons


def _queue(settings: Settings, plan: Plan) -> ActorHandle[AdapterQueue]:
    """The queue, on this node, which is the only one that must not leave."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0)(AdapterQueue).options(scheduling_strategy=here)
    steps = {task: figure.steps for task, figure in plan.figures.items()}
    references = {task: ray.put(corpus) for task, corpus in plan.corpora.items()}
    return actor.remote(references, steps, settings.training.worker_failures)


def _supervise(queue: ActorHandle[AdapterQueue], groups: WorkerGroups, table: Watch) -> None:
    """Tend the groups until nothing is left to train."""
    while True:
        view: QueueView = ray.get(queue.view.remote())
        table.show(view, groups.running)
        if not view.left:
            groups.end(view)
            return
        groups.tend(view)
        time.sleep(POLL_SECONDS)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say_what_stays(queue: ActorHandle[AdapterQueue]) -> None:
    view: QueueView = ray.get(queue.view.remote())
    states = [standing.state for standing in view.standings.values()]
    begun = sum(bool(standing.step) and standing.state not in ("done", "failed") for standing in view.standings.values())
    typer.echo(
        f"stopped: {states.count('done')} of {len(states)} adapters are done and stay; {begun} were begun, and go on from"
        " their checkpoints when the same is run again",
        err=True,
    )
