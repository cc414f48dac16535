"""The options that every command shares, and how they become settings."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lorafleet.config import Settings, load_settings

ConfigOption = Annotated[
    Path | None, typer.Option("--config", readable=False, help="A YAML file of settings (configs/ holds examples).")
]
SetOption = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="One setting, e.g. training.rank=16.")]
StateOption = Annotated[
    Path | None, typer.Option("--state", readable=False, help="The folder that holds index and adapters [./state].")
]
HubRootOption = Annotated[Path | None, typer.Option("--hub-root", help="A folder that stands in for the hub.")]
SourceOption = Annotated[str | None, typer.Option("--source", help="Where rows come from: samples or hub.")]
TasksOption = Annotated[str | None, typer.Option("--tasks", metavar="A,B", help="Only these tasks.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print data as JSON.")]


def settings_from(
    config: Path | None = None,
    overrides: list[str] | None = None,
    state: Path | None = None,
    hub_root: Path | None = None,
    source: str | None = None,
    tasks: str | None = None,
) -> Settings:
    """The settings that a command line asks for; what it says outright wins over file and environment.

    Raises:
        SettingsError: a setting is wrong, or a job would lose what it writes.
    """
    sections: dict[str, Any] = {}
    if state is not None:
        sections["state"] = state
    task_settings = {
        "hub_root": hub_root,
        "source": source,
        "names": split_names(tasks),
    }
    given = {key: value for key, value in task_settings.items() if value is not None}
    if given:
        sections["tasks"] = given
    return load_settings(config, overrides or (), **sections)


def split_names(text: str | None) -> list[str] | None:
    """The names of a comma-separated list."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]
