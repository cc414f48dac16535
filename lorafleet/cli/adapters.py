"""lorafleet adapters."""

from lorafleet.cli.options import ConfigOption, JsonOption, SetOption, StateOption, settings_from
from lorafleet.cli.output import print_json, print_table


def adapters(
    config: ConfigOption = None,
    overrides: SetOption = [],
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """The adapters of the fleet, with what their cards say."""
    from lorafleet.adapters import stored_adapters

    listed = [
        {
            "name": adapter.name,
            "task": adapter.task,
            "family": adapter.card.family if adapter.card else None,
            "rows": adapter.card.rows if adapter.card else None,
            "steps": adapter.card.steps if adapter.card else None,
            "first_loss": adapter.card.first_loss if adapter.card else None,
            "last_loss": adapter.card.last_loss if adapter.card else None,
        }
        for adapter in stored_adapters(settings_from(config, overrides, state)).adapters.values()
    ]
    if as_json:
        print_json(listed)
        return
    headings = ["name", "task", "family", "rows", "steps", "first_loss", "last_loss"]
    print_table(headings, [[_shown(adapter[heading]) for heading in headings] for adapter in listed])


def _shown(value: object) -> object:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else value
