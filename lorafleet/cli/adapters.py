"""lorafleet adapters: the pool, listed and changed while the endpoint runs."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Any
from urllib.parse import quote

import typer

from lorafleet.cli.endpoint import KeyOption, call_endpoint, endpoint_url
from lorafleet.cli.options import ConfigOption, JsonOption, SetOption, StateOption, settings_from
from lorafleet.cli.output import print_json, print_table
from lorafleet.config import Settings
from lorafleet.errors import LoRAFleetError
from lorafleet.storage import follow_umask

PATH = "/v1/adapters"
HEADINGS = ["name", "task", "family", "rows", "origin", "state", "steps", "first_loss", "last_loss"]

adapters = typer.Typer(invoke_without_command=True)


@adapters.callback()
def listing(
    context: typer.Context,
    config: ConfigOption = None,
    overrides: SetOption = [],
    state: StateOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """The adapters of the fleet, with what their cards say: as the endpoint has them where it is up, else as stored."""
    if context.invoked_subcommand is not None:
        return
    settings = settings_from(config, overrides, state)
    found = call_endpoint(settings, "GET", PATH, key)
    listed = _stored(settings) if found is None else found["data"]
    if as_json:
        print_json(listed)
        return
    rows = [adapter | (adapter["card"] or {}) | {"rows": adapter["rows"]} for adapter in listed]
    print_table(HEADINGS, [[_shown(row.get(heading)) for heading in HEADINGS] for row in rows])


@adapters.command()
def add(
    folder: Annotated[Path, typer.Argument(help="The adapter's folder, as PEFT saves it.", exists=True)],
    name: Annotated[str | None, typer.Option(help="What it is called [the folder's name].")] = None,
    task: Annotated[str | None, typer.Option(help="What it is called in weights [its name].")] = None,
    rows: Annotated[
        Path | None, typer.Option(help="JSONL, CSV or Parquet: rows with a text, or of the task's columns.", exists=True)
    ] = None,
    config: ConfigOption = None,
    overrides: SetOption = [],
    state: StateOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take an adapter into the running endpoint, with the rows by which retrieval finds it."""
    settings = settings_from(config, overrides, state)
    with _below_a_root(folder.resolve(), settings) as source, _below_a_root(rows and rows.resolve(), settings) as corpus:
        body = {"name": name or folder.resolve().name, "source": str(source), "task": task}
        added = _changed(settings, "POST", PATH, key, body | ({"corpus": str(corpus)} if corpus else {}))
    if as_json:
        print_json(added)
    else:
        typer.echo(f"{added['name']} is in the pool: rank {added['rank']}, {added['rows']} rows")


@adapters.command()
def remove(
    name: Annotated[str, typer.Argument(help="The adapter's name, or its task.")],
    config: ConfigOption = None,
    overrides: SetOption = [],
    state: StateOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take an adapter out of the running endpoint, its rows out of the index, and its folder away."""
    settings = settings_from(config, overrides, state)
    removed = _changed(settings, "DELETE", f"{PATH}/{quote(name, safe='')}", key)
    if as_json:
        print_json(removed)
    else:
        typer.echo(f"{removed['name']} is gone")


def _changed(
    settings: Settings, method: str, path: str, key: str | None, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    answer = call_endpoint(settings, method, path, key, body)
    if answer is None:
        raise LoRAFleetError(f"no endpoint listens at {endpoint_url(settings)}", "Start it: lorafleet up")
    return answer


@contextmanager
def _below_a_root(path: Path | None, settings: Settings) -> Iterator[Path | None]:
    """Where the endpoint may read a folder or file: itself, or a copy in the state folder while the block lasts."""
    roots = [root.resolve() for root in settings.adapter_roots]
    if path is None or any(path.is_relative_to(root) for root in roots):
        yield path
        return
    beside = roots[0] / f".cli-{token_hex(6)}"
    try:
        beside.mkdir(parents=True)
        if path.is_dir():
            # Links stay links: the endpoint refuses those that lead elsewhere.
            shutil.copytree(path, beside / path.name, symlinks=True)
        else:
            shutil.copyfile(path, beside / path.name)
        # The endpoint may run as another user of this machine.
        follow_umask(beside)
        yield beside / path.name
    except OSError as error:
        raise LoRAFleetError(
            f"cannot copy {path} to {roots[0]}: {_reason(error)}",
            "Let this user write there, or copy it there yourself",
        ) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _reason(error: OSError) -> str:
    """The system's reason; `shutil.copytree` lists all files that failed."""
    first = error.args[0] if isinstance(error, shutil.Error) and error.args else None
    return str(first[0][2]) if isinstance(first, list) and first else error.strerror or str(error)


def _stored(settings: Settings) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from lorafleet.adapters import stored_adapters

    return [
        {
            "name": adapter.name,
            "task": adapter.task,
            "family": adapter.family,
            "rows": adapter.rows,
            "origin": adapter.origin,
            "state": "stored",
            "card": asdict(adapter.card) if adapter.card else None,
        }
        for adapter in stored_adapters(settings).adapters.values()
    ]


def _shown(value: object) -> object:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else value
