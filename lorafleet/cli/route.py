"""lorafleet route."""

from typing import Annotated

import typer

from lorafleet.cli.options import ConfigOption, JsonOption, SetOption, StateOption, settings_from
from lorafleet.cli.output import print_json, print_weights

SHOWN_NEIGHBOURS = 5
SHOWN_CHARACTERS = 100


def route(
    text: Annotated[str, typer.Argument(help="The query.")],
    config: ConfigOption = None,
    overrides: SetOption = [],
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Which adapters a query calls for: neighbours and task weights. Generates nothing."""
    from lorafleet.fleet import Fleet

    fleet = Fleet(settings_from(config, overrides, state))
    ((neighbours, weights),) = fleet.look_up([text])
    if as_json:
        rows = [{"task": row.task, "text": row.text, "similarity": row.similarity} for row in neighbours]
        shares = dict(weights.shares)
        print_json(
            {"input": text, "weights": dict(weights), "shares": shares, "nucleus": list(weights.nucleus), "neighbours": rows}
        )
        return
    weigher = fleet.settings.weighing.weigher
    typer.echo(f"Task weights (by {weigher}: {len(weights)} adapters; {len(weights.shares)} tasks are near the query):")
    print_weights(weights)
    typer.echo(f"\nNearest of {len(neighbours)} neighbours:")
    for row in neighbours[:SHOWN_NEIGHBOURS]:
        line = " ".join(row.text.split("\n", 1)[-1].split())
        typer.echo(f"  {row.similarity:.3f}  {row.task:<16}  {line[:SHOWN_CHARACTERS]}")
