"""Measure methods on the evaluation rows, fanned out over a Ray cluster.

A worker holds the fleet on its share of a GPU (or on CPUs) and answers part after part: a method on the rows of one task in
one setting. Every part is kept when it is whole, so that a run that was ended goes on where it stopped. A part that fails is
told of and does not stop the others; a worker that dies is replaced, and what it had in hand is handed out again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
import typer
from ray.actor import ActorHandle

from jobs.cluster import cause_in_one_line, connect
from lorafleet.cli.evaluate import (
    ForceOption,
    LimitOption,
    MethodsOption,
    ReportOption,
    ScoringOption,
    SettingOption,
    SplitOption,
    check_parts,
    check_setting,
    check_split,
    present,
    refuse_failures,
    tell,
)
from lorafleet.cli.options import (
    ConfigOption,
    HubRootOption,
    JsonOption,
    SetOption,
    SourceOption,
    StateOption,
    TasksOption,
    settings_from,
    split_names,
)
from lorafleet.cli.running import run as run_command
from lorafleet.config import Settings
from lorafleet.errors import LoRAFleetError
from lorafleet.evaluation import Bench, Outcome, Plan, plan, variants
from lorafleet.evaluation.case_study import keep_case_study
from lorafleet.evaluation.harness import attempt, kept_choices, preparations, prepare, scoring_plan
from lorafleet.evaluation.plan import ASKED, Asked
from lorafleet.evaluation.records import Part, split_folder
from lorafleet.progress import Bar, progress
from lorafleet.tasks import Split

MOST_TRIES = 2


class Worker:
    """A fleet in memory. A Ray actor."""

    def __init__(self, settings: Settings, limit: int | None) -> None:
        torch.set_num_threads(max(1, int(settings.evaluation.cpus_per_worker)))
        self._bench = Bench(settings.reserving(settings.evaluation.gpus_per_worker), limit)
        self._task = ""

    def compute(self, part: Part, fingerprint: str) -> tuple[int, str]:
        """Answer a part and keep it: how many rows, or why not."""
        if part.task != self._task:
            self._bench.forget()
            self._task = part.task
        return attempt(self._bench, part, fingerprint)

    def case_study(self) -> None:
        """Ask the query of the case study, and keep the answers."""
        keep_case_study(self._bench)


@dataclass
class Queue:
    """The parts that wait, by task: who has worked at a task goes on with it, for its neighbours are at hand."""

    waiting: dict[str, list[Part]] = field(default_factory=dict)
    tries: dict[Part, int] = field(default_factory=dict)

    def put(self, part: Part) -> None:
        """Add a part."""
        self.waiting.setdefault(part.task, []).append(part)

    def take(self, task: str | None) -> Part | None:
        """The next part of a task, else of the one with most of them; None when there is no more."""
        left = {name: parts for name, parts in self.waiting.items() if parts}
        if not left:
            return None
        chosen = task if task in left else max(left, key=lambda name: len(left[name]))
        part = left[chosen].pop(0)
        self.tries[part] = self.tries.get(part, 0) + 1
        return part


def evaluate(
    settings: Settings,
    methods: Sequence[str] | None = None,
    asked: Asked = "iid",
    limit: int | None = None,
    force: bool = False,
    choose_scoring: bool = False,
    case_study: bool = False,
    split: Split = "evaluation",
) -> Outcome:
    """Compute the parts that are missing, on the cluster; Ray is not started where nothing is.

    Args:
        choose_scoring: first choose on training rows how each task's options are compared.

    Raises:
        LoRAFleetError: settings, rows or adapters cannot be used, or the cluster has no room for a worker.
    """
    bench = Bench(settings, limit)
    bench.check_writable()
    chosen = variants(methods, ASKED[asked], settings.evaluation.multitask is not None)
    work = plan(bench, chosen, ASKED[asked], split, force)
    check_parts(work, split)
    with progress("looking for neighbours", preparations(bench, chosen, split)) as bar:
        prepare(bench, chosen, bar.advance, split)
    plans = [scoring_plan(bench)] if choose_scoring else []
    outcome = _fan_out(bench, [*plans, work], case_study and any(one.method.retrieves for one in chosen))
    outcome.parts = work.parts
    if choose_scoring and not any(part.split == "train" for part in outcome.failed):
        kept_choices(bench)
    return outcome


def _fan_out(bench: Bench, plans: Sequence[Plan], case_study: bool) -> Outcome:
    outcome = Outcome(kept=sum(one.kept for one in plans))
    fingerprints = {part: mark for one in plans for part, mark in one.parts.items()}
    queue = Queue()
    for one in plans:
        for part in one.missing:
            queue.put(part)
    missing = sum(len(one.missing) for one in plans)
    if not missing and not case_study:
        return outcome
    connect()
    with progress("evaluating", sum(one.rows(bench) for one in plans)) as bar:
        workers = _Workers(bench, fingerprints, queue, min(_slots(bench.settings), max(missing, 1)))
        try:
            workers.run(outcome, bar)
            if case_study:
                workers.ask_case_study()
        finally:
            workers.end()
    return outcome


class _Workers:
    """The actors, and what each has in hand."""

    def __init__(self, bench: Bench, fingerprints: dict[Part, str], queue: Queue, count: int) -> None:
        self._bench, self._fingerprints, self._queue = bench, fingerprints, queue
        self._deaths_left = bench.settings.evaluation.worker_failures
        self._actors: list[ActorHandle[Any]] = []
        self._in_hand: dict[ray.ObjectRef[tuple[int, str]], tuple[ActorHandle[Any], Part]] = {}
        for _ in range(count):
            self._actors.append(self._start())

    def run(self, outcome: Outcome, bar: Bar) -> None:
        """Work until nothing waits and nothing is in hand."""
        for actor in list(self._actors):
            self._hand_out(actor, None)
        while self._in_hand:
            (done, *_), _ = ray.wait(list(self._in_hand))
            actor, part = self._in_hand.pop(done)
            try:
                rows, why = ray.get(done)
            except ray.exceptions.RayError as error:
                self._bury(actor, part, error, outcome)
                continue
            if why:
                outcome.failed[part] = why
            else:
                outcome.computed += 1
            bar.advance(rows, str(part))
            self._hand_out(actor, part.task)
        # Nobody is left to do it.
        while (left := self._queue.take(None)) is not None:
            outcome.failed[left] = "the workers died before its turn"

    def ask_case_study(self) -> None:
        """Have a worker ask the query of the case study, another one where it has died meanwhile.

        Raises:
            LoRAFleetError: none can.
        """
        for actor in list(self._actors):
            try:
                ray.get(actor.case_study.remote())
            except ray.exceptions.RayActorError:
                self._actors.remove(actor)
            except ray.exceptions.RayError as error:
                raise LoRAFleetError(f"the case study failed: {cause_in_one_line(error)}") from None
            else:
                return
        raise LoRAFleetError("the case study failed: no worker is left", "Run again: what was computed is kept")

    def end(self) -> None:
        """Let the actors go."""
        for actor in self._actors:
            ray.kill(actor)

    def _start(self) -> "ActorHandle[Any]":
        chosen = self._bench.settings.evaluation
        remote = ray.remote(num_cpus=chosen.cpus_per_worker, num_gpus=chosen.gpus_per_worker)(Worker)
        actor: ActorHandle[Any] = remote.remote(self._bench.settings, self._bench.limit)
        return actor

    def _hand_out(self, actor: "ActorHandle[Any]", task: str | None) -> None:
        part = self._queue.take(task)
        if part is not None:
            self._in_hand[actor.compute.remote(part, self._fingerprints[part])] = actor, part

    def _bury(self, actor: "ActorHandle[Any]", part: Part, error: Exception, outcome: Outcome) -> None:
        """A worker died: another takes its place while there are tries left, and its part waits again."""
        self._actors.remove(actor)
        if self._queue.tries[part] >= MOST_TRIES:
            outcome.failed[part] = f"its worker died: {cause_in_one_line(error)[:200]}"
        else:
            self._queue.put(part)
        if self._deaths_left > 0:
            self._deaths_left -= 1
            self._actors.append(self._start())
            self._hand_out(self._actors[-1], part.task)


def _slots(settings: Settings) -> int:
    """How many workers the cluster has room for.

    Raises:
        LoRAFleetError: for none.
    """
    chosen, there = settings.evaluation, ray.cluster_resources()
    slots = there.get("CPU", 0) / chosen.cpus_per_worker
    if chosen.gpus_per_worker:
        slots = min(slots, there.get("GPU", 0) / chosen.gpus_per_worker)
    if slots < 1:
        raise LoRAFleetError(
            f"the cluster has {there.get('CPU', 0):g} CPU and {there.get('GPU', 0):g} GPU, too few for a worker",
            "Lower evaluation.cpus_per_worker or evaluation.gpus_per_worker, or join a larger cluster",
        )
    return min(int(slots), chosen.workers or int(slots))


def command(
    methods: MethodsOption = None,
    tasks: TasksOption = None,
    setting: SettingOption = "iid",
    split: SplitOption = "evaluation",
    limit: LimitOption = None,
    report: ReportOption = False,
    scoring: ScoringOption = False,
    force: ForceOption = False,
    config: ConfigOption = None,
    overrides: SetOption = [],
    state: StateOption = None,
    hub_root: HubRootOption = None,
    source: SourceOption = None,
    as_json: JsonOption = False,
) -> None:
    """The table of the paper on this fleet, computed on the Ray cluster that this runs on. What is computed is kept."""
    asked, rows = check_setting(setting), check_split(split)
    settings = settings_from(config, overrides, state, hub_root, source, tasks)
    outcome = evaluate(settings, split_names(methods), asked, limit, force, scoring, report and rows == "evaluation", rows)
    tell(outcome)
    if outcome.done:
        folder = split_folder(Bench(settings, limit).folder, rows)
        present(settings, folder, split_names(methods), split_names(tasks), asked, report, as_json, outcome.parts)
    refuse_failures(outcome)


def main() -> None:
    """The entry of `python -m jobs.evaluate`."""
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    application.command()(command)
    run_command(lambda: application())


if __name__ == "__main__":
    main()
