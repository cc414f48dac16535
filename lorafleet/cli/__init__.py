"""The command line: one file per command, gathered here. Heavy imports wait until a command runs."""

import os

import typer

from lorafleet.cli.adapters import adapters
from lorafleet.cli.ask import ask
from lorafleet.cli.demo import demo
from lorafleet.cli.doctor import doctor
from lorafleet.cli.evaluate import evaluate
from lorafleet.cli.index import index
from lorafleet.cli.jobs import embed, train, tune
from lorafleet.cli.keys import keys
from lorafleet.cli.route import route
from lorafleet.cli.running import run
from lorafleet.cli.service import down, up
from lorafleet.cli.status import status
from lorafleet.cli.tasks import tasks

app = typer.Typer(
    help="Train a fleet of LoRA adapters, index what each was trained on, and compose them for every request.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (tasks, up, down, status, route, ask, evaluate, doctor, demo):
    app.command()(command)
app.add_typer(adapters, name="adapters")
app.add_typer(index, name="index")
app.add_typer(keys, name="keys")
# These are the jobs themselves, with the options that they declare.
for job in (embed, train, tune):
    app.command(
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
        add_help_option=False,
    )(job)


def main() -> None:
    """The console script `lorafleet`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    run(app)


__all__ = ["app", "main"]
