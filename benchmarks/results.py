"""What docs/results.md says, from nothing: a fleet is trained, and every method answers the same rows.

    python -m benchmarks.results --hub-root DIR --state DIR
    python -m benchmarks.results --state DIR --tables > tables.md

Every step is a command of LoRAFleet of its own that does only what is missing: what was ended goes on where it stopped.
Three indexes are compared, each in an evaluation folder of its own. What is to be chosen is compared on the first validation
rows of each task, the methods on evaluation rows; those that take long answer the first rows of each task, and some others
answer these once more.
"""

import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import ray
import typer

from lorafleet.cli.options import HubRootOption, SetOption, StateOption, settings_from
from lorafleet.cli.running import run
from lorafleet.config import Settings
from lorafleet.errors import LoRAFleetError, SettingsError
from lorafleet.evaluation import read_results
from lorafleet.evaluation.intervals import Estimate
from lorafleet.evaluation.records import split_folder
from lorafleet.evaluation.report.comparison import against_tasks, beside_the_paper
from lorafleet.evaluation.report.markdown import as_markdown
from lorafleet.evaluation.report.retrieval import retrieval_accuracy
from lorafleet.evaluation.results import REFERENCE, Results
from lorafleet.evaluation.under_test import Setting

CONFIG = Path("configs/one-gpu.yaml")
TOGETHER = "everything"
FIRST_ROWS = 50
VALIDATION_ROWS = 60
SHOWN_LINES = 12
PAPER = ("weighing.weigher=nucleus", "weighing.sharpness=1", "composing.method=linear")
"""Retrieval and composition as arXiv 2602.21222 has them, by default."""

INDEXES: Mapping[str, tuple[str, ...]] = {
    "paper": ("index.forms=[instruction]", *PAPER),
    "drawn": ("index.forms=[instruction,fields,bare,bare,bare]", "index.pooling=drawn"),
    "tuned": ("index.forms=[instruction,fields,bare,bare,bare]", "index.pooling=drawn", "models.encoder={state}/encoder"),
}
"""What rows' vectors are: the paper's keys, or one drawn form of each, by the encoder as it comes or a tuned one."""

BARE = "@query=bare"
QUICK = (
    *("base", "perfect", "selection", "fusion", "mixture", "linear", "cat", "magnitude_prune", "top_k", "softmax"),
    *("prototypes", "sparse_projection", "moe_top1", "moe_top3", "moe_soft", "joint@sharpness=8", "smear", "adapter_soup"),
    *("uniform", "multitask_lora", "linear" + BARE, "cat" + BARE),
)
SLOW = ("ties", "dare_linear", "dare_ties", "svd", "arrow", "lorahub")
BESIDE_THE_SLOW = ("base", "perfect", "linear", "cat", "moe_top3", "multitask_lora")
OF_THE_PAPER = ("linear@sharpness=1", "cat@sharpness=1", "cat@sharpness=8")
CANDIDATES = {
    "paper": OF_THE_PAPER,
    "drawn": (
        *(*OF_THE_PAPER, "moe_top1", "moe_top3"),
        *("joint@sharpness=1", "joint@sharpness=8", "joint@sharpness=8@k=2", "joint@sharpness=8@k=5"),
    ),
    "tuned": ("cat@sharpness=1", "moe_top3", "joint@sharpness=8"),
}
"""What the default is chosen from, on validation rows."""
LIKELIEST = {
    "drawn": ("cat@sharpness=1", "moe_top3", "joint@sharpness=8", "joint@sharpness=8@k=5", "joint@sharpness=8" + BARE),
    "tuned": ("cat@sharpness=1", "joint@sharpness=8", "joint@sharpness=8" + BARE),
}
"""Those of them that answer evaluation rows."""


def in_both_forms(names: Iterable[str]) -> tuple[str, ...]:
    """With the instruction, as a program asks, and without it, as people do."""
    return tuple(name + form for form in ("", BARE) for name in names)


@dataclass(frozen=True)
class Step:
    """A command of LoRAFleet, by the name that its log has."""

    name: str
    module: str
    arguments: tuple[str, ...]

    def run(self, common: Sequence[str], logs: Path, environment: Mapping[str, str]) -> bool:
        """Whether it went well; its last lines are shown where it did not."""
        logs.mkdir(parents=True, exist_ok=True)
        log, started = logs / f"{self.name}.log", time.monotonic()
        command = [sys.executable, "-m", self.module, *common, *self.arguments]
        with log.open("w", encoding="utf-8") as output:
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False).returncode
        typer.echo(f"{self.name}: {'done' if code == 0 else f'exit code {code}'} after {time.monotonic() - started:.0f} s")
        if code != 0:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            typer.echo("\n".join(f"    {line}" for line in lines[-SHOWN_LINES:]))
        return code == 0


def comparison(
    settings: Settings, index: str, methods: Iterable[str], split: str = "evaluation", limit: int | None = None
) -> Step:
    """Methods over the rows of a split, by one index."""
    overrides = [f"evaluation.folder={folder_of(settings, index)}", f"evaluation.multitask={TOGETHER}", *INDEXES[index]]
    chosen = _set(*(override.format(state=settings.state.resolve()) for override in overrides))
    first = ("first", str(limit)) if limit else ()
    bound = ("--limit", str(limit)) if limit else ()
    asked = ("--methods", ",".join(methods), "--setting", "all", "--split", split, *bound)
    return Step("-".join((index, split, *first)), "jobs.evaluate", (*asked, *chosen))


def _set(*overrides: str) -> tuple[str, ...]:
    return tuple(part for override in overrides for part in ("--set", override))


def folder_of(settings: Settings, index: str) -> Path:
    """Where a comparison by this index is kept."""
    return settings.state.resolve() / f"evaluation-{index}"


def stages(settings: Settings) -> Mapping[str, tuple[Step, ...]]:
    """The steps of each stage; they need nothing of each other, and all of the stage before."""
    fleet = (
        Step("train", "jobs.train_adapters", ()),
        # Once through the rows of all tasks: that alone is half as many steps as all the others take together.
        Step("train-together", "jobs.train_adapters", _set(f"training.together={TOGETHER}", "training.epochs=1")),
        Step("tune", "jobs.train_retriever", ()),
    )
    compared = (
        comparison(settings, "paper", QUICK),
        comparison(settings, "paper", (*BESIDE_THE_SLOW, *SLOW), limit=FIRST_ROWS),
        *(
            comparison(settings, index, (REFERENCE, *in_both_forms(names)), "validation", VALIDATION_ROWS)
            for index, names in CANDIDATES.items()
        ),
        *(comparison(settings, index, (REFERENCE, *names)) for index, names in LIKELIEST.items()),
    )
    return {"fleet": fleet, "comparisons": compared}


def measure(settings: Settings, common: Sequence[str], only: Sequence[str], at_once: int) -> bool:
    """Run the steps on a Ray of this machine; whether all went well.

    Raises:
        SettingsError: there is no stage and no step of a name.
    """
    known = [name for stage, steps in stages(settings).items() for name in (stage, *(step.name for step in steps))]
    if unknown := [name for name in only if name not in known]:
        raise SettingsError(f"--only names {', '.join(unknown)}", f"Allowed: {', '.join(known)}")
    ray.init("local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    for stage, steps in stages(settings).items():
        chosen = [step for step in steps if not only or {stage, step.name} & set(only)]
        with ThreadPoolExecutor(at_once) as pool:
            ended = list(pool.map(lambda step: step.run(common, settings.state / "logs", environment), chosen))
        if not all(ended):
            return False
    return True


def tables(settings: Settings) -> Iterable[str]:
    """What is kept, as Markdown."""
    for index in INDEXES:
        folder = folder_of(settings, index)
        for place in (folder, folder.with_name(f"{folder.name}-first-{FIRST_ROWS}")):
            if (place / "predictions").is_dir():
                results = read_results(place)
                yield f"# {place.name}"
                yield methods_table(results)
                sections = [build(results) for build in (retrieval_accuracy, against_tasks, beside_the_paper)]
                yield as_markdown(results, [section for section in sections if section is not None])
        place = split_folder(folder.with_name(f"{folder.name}-first-{VALIDATION_ROWS}"), "validation")
        if (place / "predictions").is_dir():
            yield f"# {folder.name}, the first {VALIDATION_ROWS} validation rows of each task"
            yield candidates_table(read_results(place))


def methods_table(results: Results) -> str:
    """Every method's mean in each setting, the best first."""
    settings = results.settings
    names = dict.fromkeys(name for setting in settings for name in results.methods(setting))
    headings = ["method", *(heading for setting in settings for heading in (setting, "of perfect"))]
    rows = []
    for name in sorted(names, key=lambda name: -_value(results.mean(settings[0], name))):
        cells = [f"`{name}`"]
        for setting in settings:
            against = results.against(setting, name)
            share = against[1] if against and name != REFERENCE else None
            cells += [_with_interval(results.mean(setting, name)), f"{share.value:.1f}" if share else ""]
        rows.append(cells)
    return _table(headings, rows)


def candidates_table(results: Results) -> str:
    """What to choose by: with the own adapter in the pool and without it, by queries with instruction and bare."""
    columns: Mapping[str, tuple[Setting, str]] = {
        "instruction": ("iid", ""),
        "bare": ("iid", BARE),
        "masked": ("ood", ""),
        "masked, bare": ("ood", BARE),
    }
    found = {}
    measured = results.methods("iid")
    for name in [name for name in measured if BARE not in name]:
        values = {column: results.mean(setting, name + form) for column, (setting, form) in columns.items()}
        found[name] = {column: _value(value) for column, value in values.items()}
    means = {name: sum(values.values()) / len(values) for name, values in found.items()}
    rows = [
        [f"`{name}`", *(_figure(value, 1) for value in found[name].values()), _figure(means[name], 2)]
        for name in sorted(found, key=lambda name: -means[name])
    ]
    return _table(["method", *columns, "mean"], rows)


def _value(estimate: Estimate | None) -> float:
    return estimate.value if estimate else float("nan")


def _figure(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _with_interval(estimate: Estimate | None) -> str:
    return f"{estimate.value:.1f} ({estimate.low:.1f} to {estimate.high:.1f})" if estimate else ""


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def command(
    config: Annotated[Path, typer.Option("--config", help="YAML file of settings.")] = CONFIG,
    overrides: SetOption = [],
    state: StateOption = None,
    hub_root: HubRootOption = None,
    only: Annotated[
        str | None, typer.Option(metavar="A,B", help="Only these stages, or steps by their logs' names.")
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Steps side by side, where they need nothing of each other.")] = 3,
    show: Annotated[bool, typer.Option("--tables", help="Print the tables of what is kept, and run nothing.")] = False,
) -> None:
    """Train a fleet and measure every method on it, or print the tables of what was measured."""
    settings = settings_from(config, overrides, state, hub_root)
    if show:
        for text in tables(settings):
            typer.echo(text)
        return
    common = ["--config", str(config), *_set(*overrides)]
    common += ["--state", str(settings.state), *(["--hub-root", str(hub_root)] if hub_root else [])]
    if not measure(settings, common, only.split(",") if only else [], at_once):
        raise LoRAFleetError(f"a step failed; the logs are in {settings.state / 'logs'}", "Run again: what is done is kept")


def main() -> None:
    """The entry of `python -m benchmarks.results`."""
    run(lambda: typer.run(command))


if __name__ == "__main__":
    main()
