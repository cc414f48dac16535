"""lorafleet demo: the whole way of the data on this machine, ending with the case study of arXiv 2602.21222 (section 7)."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from lorafleet.cli.ask import answer_prompt, ask_endpoint
from lorafleet.cli.endpoint import endpoint_url
from lorafleet.cli.jobs import run_job
from lorafleet.cli.options import ConfigOption, HubRootOption, SetOption, SourceOption, StateOption, settings_from
from lorafleet.cli.output import print_table, print_weights
from lorafleet.cli.service import deploy, job_arguments, ray_environment, start_services
from lorafleet.config import Settings
from lorafleet.errors import LoRAFleetError
from lorafleet.storage import write_json

QUERY = "Where can I buy a tennis ball?"
OPTIONS = {
    "ball": "You can purchase a tennis ball at any sports store.",
    "racket": "You can purchase a tennis racket at any sports store.",
}
METHODS = ("linear", "cat", "ties", "magnitude_prune")


def demo(
    config: ConfigOption = None,
    overrides: SetOption = [],
    state: StateOption = None,
    hub_root: HubRootOption = None,
    source: SourceOption = None,
) -> None:
    """Embed 22 corpora, train 22 adapters, serve, ask, and print what was composed and why."""
    settings = settings_from(config, overrides, state, hub_root, source)
    common = job_arguments(config, overrides, settings)
    rows_from = [
        *(["--hub-root", str(settings.tasks.hub_root)] if hub_root else []),
        *(["--source", source] if source else []),
    ]
    seconds: dict[str, float] = {}
    with _stage("start", "Chroma server and Ray head", seconds):
        start_services(settings)
    for name, module, title in (
        ("embed", "jobs.embed_corpora", "corpora to index"),
        ("train", "jobs.train_adapters", "one adapter a task"),
    ):
        with _stage(name, title, seconds):
            if run_job(module, [*common, *rows_from], ray_environment(settings)) != 0:
                raise LoRAFleetError(f"the demo stopped at its stage {name}", "Mend what stands above and run it again")
    with _stage("serve", "the endpoint", seconds):
        deploy(settings, common)
    with _stage("case_study", "the case study of the paper", seconds):
        case_study = _case_study(settings)
    summary = {**_what_there_is(settings), **case_study, "seconds": seconds, "url": endpoint_url(settings)}
    write_json(settings.state / "demo.json", summary)
    typer.echo(f"\nThe endpoint is up: {endpoint_url(settings)}   Summary: {_near(settings.state / 'demo.json')}")
    typer.echo('Ask it: lorafleet ask "..."   End it: make stop (or lorafleet down)')


@contextmanager
def _stage(name: str, title: str, seconds: dict[str, float]) -> Iterator[None]:
    typer.echo(f"\n== {name}: {title}")
    began = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - began, 1)
    typer.echo(f"   {seconds[name]:.1f} s")


def _case_study(settings: Settings) -> dict[str, Any]:
    from lorafleet.fleet import Fleet

    fleet = Fleet(settings)
    ((neighbours, weights),) = fleet.look_up([QUERY])
    typer.echo(f"\nQuery: {QUERY}\n\nNearest rows of the corpora:")
    for row in neighbours[:3]:
        typer.echo(f"  {row.similarity:.3f}  {row.task:<16}  {' '.join(row.text.split())[:90]}")
    typer.echo("\nTask weights:")
    print_weights(weights)
    choices, table = {}, []
    for method in METHODS:
        (scores,) = fleet.score([answer_prompt(QUERY)], [list(OPTIONS.values())], method=method, weights=[weights])
        by_option = dict(zip(OPTIONS, (score.by("token") for score in scores), strict=True))
        choices[method] = max(by_option, key=lambda option: by_option[option])
        table.append([method, choices[method], *(f"{score:.3f}" for score in by_option.values())])
    typer.echo("\nWhat each method chooses, by mean log-likelihood:")
    print_table(["method", "chooses", *OPTIONS], table)
    answer = ask_endpoint(settings, answer_prompt(QUERY), max_tokens=32)
    if answer is None:
        raise LoRAFleetError(f"the endpoint at {endpoint_url(settings)} does not answer", "lorafleet status says what runs")
    composed = ", ".join(f"{task} {weight:.2f}" for task, weight in answer["composition"]["weights"].items())
    said = answer["answer"].strip() or "(nothing: the model ended its answer at once)"
    typer.echo(f"\nOver HTTP, composed by {answer['composition']['method']} of {composed}:\n  {said}\n")
    return {"route": {"query": QUERY, "weights": dict(weights)}, "choices": choices, "answer": answer}


def _what_there_is(settings: Settings) -> dict[str, Any]:
    from lorafleet.adapters import stored_adapters
    from lorafleet.retrieval import read_manifest

    manifest = read_manifest(settings.state / "index.json")
    cards = {task: adapter.card for task, adapter in stored_adapters(settings).adapters.items()}
    return {
        "rows": manifest.rows if manifest else {},
        "adapters": {
            task: {"first_loss": card.first_loss, "last_loss": card.last_loss, "seconds": card.seconds}
            for task, card in cards.items()
            if card is not None
        },
    }


def _near(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
