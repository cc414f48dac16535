"""lorafleet index: the index as a file, and back."""

from pathlib import Path
from typing import Annotated

import typer

from lorafleet.cli.options import ConfigOption, SetOption, StateOption, settings_from
from lorafleet.errors import SettingsError
from lorafleet.progress import progress

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A Parquet file.")]

index = typer.Typer(help="The index as a file: for a backup, or another Chroma server.", no_args_is_help=True)


@index.command("export")
def export_file(
    file: FileArgument, config: ConfigOption = None, overrides: SetOption = [], state: StateOption = None
) -> None:
    """Write all rows with their vectors into a file; the endpoint goes on meanwhile, and nothing comes into the index."""
    from lorafleet.retrieval import open_for_writing
    from lorafleet.retrieval.backup import export_index
    from lorafleet.tasks import prompt_version

    opened = open_for_writing(settings_from(config, overrides, state), prompt_version())
    try:
        with progress("exporting", sum(opened.counts().values())) as bar:
            manifest = export_index(opened, file, bar.advance)
    except OSError as error:
        raise SettingsError(f"{file} cannot be written: {error.strerror}", "Name another file") from None
    typer.echo(f"{sum(manifest.rows.values())} rows of {len(manifest.rows)} tasks are in {file}")


@index.command("import")
def import_file(
    file: FileArgument, config: ConfigOption = None, overrides: SetOption = [], state: StateOption = None
) -> None:
    """Let the rows of a file be the index, in the place of those that are searched now, in one step at the end."""
    from lorafleet.retrieval import indexing, open_for_writing, server
    from lorafleet.retrieval.backup import described, import_index
    from lorafleet.tasks import prompt_version

    settings = settings_from(config, overrides, state)
    count = sum(described(file).rows.values())
    if server.on_this_machine(settings.index.url):
        server.start(settings)
    with indexing(settings.state), progress("importing", count) as bar:
        manifest = import_index(open_for_writing(settings, prompt_version()), file, bar.advance)
    typer.echo(f"{sum(manifest.rows.values())} rows of {len(manifest.rows)} tasks are searched now")
