"""lorafleet ask."""

from typing import Annotated, Any

import typer

from lorafleet.cli.endpoint import KeyOption, call_endpoint
from lorafleet.cli.options import ConfigOption, JsonOption, SetOption, StateOption, settings_from
from lorafleet.cli.output import print_json, print_weights
from lorafleet.config import Settings


def ask(
    text: Annotated[str, typer.Argument(help="The query.")],
    method: Annotated[
        str | None, typer.Option(help="How the adapters are combined, such as linear or cat [composing.method].")
    ] = None,
    model: Annotated[str, typer.Option(help="auto (retrieval decides), base, or an adapter's name.")] = "auto",
    max_tokens: Annotated[int | None, typer.Option(help="At most so many new tokens.")] = None,
    config: ConfigOption = None,
    overrides: SetOption = [],
    state: StateOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """The answer with its composition, from the endpoint where it is up, else from this process."""
    settings = settings_from(config, overrides, state)
    prompt = answer_prompt(text)
    found = ask_endpoint(settings, prompt, model, method, max_tokens, key)
    if found is None:
        found = _ask_here(settings, prompt, model, method, max_tokens)
    if as_json:
        print_json(found)
        return
    typer.echo(found["answer"])
    typer.echo(f"\nComposed by {found['composition']['method']} of:")
    print_weights(found["composition"]["weights"])


def answer_prompt(text: str) -> str:
    """A query as the adapters were trained to answer it: the cue behind the text."""
    return f"{text}\nAnswer:"


def ask_endpoint(
    settings: Settings,
    prompt: str,
    model: str = "auto",
    method: str | None = None,
    max_tokens: int | None = None,
    key: str | None = None,
) -> dict[str, Any] | None:
    """Ask over HTTP; None where no endpoint answers.

    Raises:
        LoRAFleetError: the endpoint refuses the request.
    """
    body: dict[str, Any] = {"model": model, "prompt": prompt, "stop": ["\n"], "temperature": 0}
    if method is not None:
        body["composition"] = {"method": method}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    answer = call_endpoint(settings, "POST", "/v1/completions", key, body)
    if answer is None:
        return None
    return {
        "answer": answer["choices"][0]["text"].strip(),
        "composition": answer["composition"],
        "timings": answer["timings"],
    }


def _ask_here(settings: Settings, prompt: str, model: str, method: str | None, max_tokens: int | None) -> dict[str, Any]:
    from lorafleet.engine import GenerationRequest
    from lorafleet.fleet import Fleet

    fleet = Fleet(settings)
    if model == "auto":
        composition = fleet.composition(fleet.route(prompt), method)
    else:
        composition = fleet.composition({} if model == "base" else {model: 1.0}, method)
    limit = max_tokens or settings.generation.max_tokens
    (answer,) = fleet.engine.generate([GenerationRequest(prompt, composition, max_tokens=limit, stop=("\n",))])
    answer.checked()
    return {
        "answer": answer.text.strip(),
        "composition": {"method": composition.method, "weights": dict(composition.weights), "density": composition.density},
    }
