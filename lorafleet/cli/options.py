"""The options that every command shares, and how they become settings."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lorafleet.config import Section, Settings, load_settings
from lorafleet.errors import SettingsError

RAY_WORKING_DIRECTORIES = "runtime_resources/working_dir_files"

ConfigOption = Annotated[Path | None, typer.Option("--config", help="A YAML file of settings (configs/ holds examples).")]
SetOption = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="One setting, e.g. training.rank=16.")]
StateOption = Annotated[Path | None, typer.Option("--state", help="The folder that holds index and adapters [./state].")]
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
        SettingsError: a setting is wrong, or `state` or `evaluation.folder` would be lost.
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
    settings = load_settings(config, overrides or (), **sections)
    in_job, folder = RAY_WORKING_DIRECTORIES in str(Path.cwd()), settings.evaluation.folder
    if in_job and not settings.state.is_absolute():
        raise SettingsError(
            f"state = {settings.state} is relative, and a job's working directory is a copy that Ray deletes",
            "Give an absolute folder: --state DIR, or LORAFLEET_STATE in the environment of 'ray start'",
        )
    if in_job and folder is not None and not folder.is_absolute():
        raise SettingsError(
            f"evaluation.folder = {folder} is relative, and a job's working directory is a copy that Ray deletes",
            "Give an absolute folder, or none: then it is the state folder's evaluation/",
        )
    return _absolute(settings)


def split_names(text: str | None) -> list[str] | None:
    """The names of a comma-separated list."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _absolute(settings: Settings) -> Settings:
    """The settings as they mean the same in Ray's workers, whose working directory is another."""
    models, tasks, tuning, evaluation = settings.models, settings.tasks, settings.tuning, settings.evaluation
    hub_root, start, folder = tasks.hub_root, tuning.start, evaluation.folder
    sections: dict[str, Section] = {
        "models": models.model_copy(update={"base": _model(models.base), "encoder": _model(models.encoder)}),
        "tasks": tasks.model_copy(
            update={
                "hub_root": hub_root.resolve() if hub_root else None,
                "declarations": [path.resolve() for path in tasks.declarations],
            }
        ),
        "tuning": tuning.model_copy(update={"start": _model(start) if start else None}),
        "evaluation": evaluation.model_copy(update={"folder": folder.resolve() if folder else None}),
    }
    return settings.model_copy(update={"state": settings.state.resolve(), **sections})


def _model(reference: str) -> str:
    """A model's files here by their absolute path; a hub id or a package's model as it is."""
    path = Path(reference).expanduser()
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        # Not resolved: in the hub's cache files are links to what has another name, without .gguf.
        return str(path.absolute())
    return reference
