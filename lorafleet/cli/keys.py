"""lorafleet keys: who may use the endpoint."""

from dataclasses import asdict
from typing import Annotated, cast

import typer

from lorafleet.cli.options import ConfigOption, JsonOption, SetOption, StateOption, settings_from
from lorafleet.cli.output import print_json, print_table
from lorafleet.errors import SettingsError
from lorafleet.keys import Role, StoredKey, add_key, read_keys, remove_key

NameArgument = Annotated[str, typer.Argument(help="Who the key is for.")]
HEADINGS = ["name", "role", "created"]

keys = typer.Typer(help="API keys of the endpoint; while there are none, it is open.", no_args_is_help=True)


@keys.command()
def add(
    name: NameArgument,
    role: Annotated[str, typer.Option(help="use (ask and look) or admin (change the pool as well).")] = "use",
    config: ConfigOption = None,
    overrides: SetOption = [],
    state: StateOption = None,
) -> None:
    """Make a key, and print it this once: only its hash is kept."""
    if role not in ("use", "admin"):
        raise SettingsError(f"role is {role!r}", "Allowed: use, admin")
    typer.echo(add_key(settings_from(config, overrides, state).keys_file, name, cast(Role, role)))


@keys.command("list")
def listing(
    config: ConfigOption = None,
    overrides: SetOption = [],
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """The keys there are, without what opens anything."""
    listed = [_described(key) for key in read_keys(settings_from(config, overrides, state).keys_file)]
    if as_json:
        print_json(listed)
    else:
        print_table(HEADINGS, [[key[heading] for heading in HEADINGS] for key in listed])


@keys.command()
def remove(
    name: NameArgument,
    config: ConfigOption = None,
    overrides: SetOption = [],
    state: StateOption = None,
) -> None:
    """Take a key away; the endpoint knows it at once."""
    left = remove_key(settings_from(config, overrides, state).keys_file, name)
    typer.echo(f"{name} opens nothing any more" if left else f"{name} was the last key: the endpoint is open to all now")


def _described(key: StoredKey) -> dict[str, str]:
    return {heading: asdict(key)[heading] for heading in HEADINGS}
