"""lorafleet embed, train and tune: the jobs, run as programs of their own, so that the library needs no Ray."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

import typer


def embed(context: typer.Context) -> None:
    """Corpora to index: the same as python -m jobs.embed_corpora (see --help there)."""
    raise typer.Exit(run_job("jobs.embed_corpora", context.args))


def train(context: typer.Context) -> None:
    """Adapters: the same as python -m jobs.train_adapters (see --help there)."""
    raise typer.Exit(run_job("jobs.train_adapters", context.args))


def tune(context: typer.Context) -> None:
    """The encoder, to tell tasks apart: the same as python -m jobs.train_retriever (see --help there)."""
    raise typer.Exit(run_job("jobs.train_retriever", context.args))


def run_job(
    module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None, silent: bool = False
) -> int:
    """Run a module as a program, with this terminal, and give its exit code.

    Args:
        silent: what it prints is for programs; its errors are heard all the same.
    """
    command = [sys.executable, "-m", module, *arguments]
    output = subprocess.DEVNULL if silent else None
    process = subprocess.Popen(command, env={**os.environ, **(environment or {})}, stdout=output)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            # The terminal has sent it to the job as well, which ends in its own way.
            continue
