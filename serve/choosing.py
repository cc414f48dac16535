"""What `model` and `composition` of a request mean together."""

from collections.abc import Mapping
from dataclasses import dataclass

from lorafleet.adapters import Roster
from lorafleet.errors import UnknownAdapter, closest
from serve.errors import ApiError
from serve.protocol import CompositionRequest

AUTO = "auto"
BASE = "base"


@dataclass(frozen=True)
class Choice:
    """The composition that a request asks for.

    Attributes:
        weights: by task; None where retrieval finds them.
        method: None for the one of the settings; so are density, p and top_k.
    """

    weights: Mapping[str, float] | None = None
    method: str | None = None
    density: float | None = None
    p: float | None = None
    top_k: int | None = None


def choose(model: str, composition: CompositionRequest | None, roster: Roster) -> Choice:
    """The composition of a request: an explicit one wins over `auto`, a model that is named wants no other weights.

    Raises:
        ApiError: 404 for a model or adapter that is not there, 400 where model and composition contradict each other.
    """
    wish = composition or CompositionRequest()
    if model == AUTO:
        if wish.weights is None:
            return Choice(None, wish.method, wish.density, wish.p, wish.top_k)
        return Choice(_by_task(wish.weights, roster), wish.method, wish.density)
    named = {} if model == BASE else {_task_of_model(model, roster): 1.0}
    contradicting = (("weights",) if wish.weights is not None else ()) + wish.by_retrieval
    if contradicting:
        field = f"composition.{contradicting[0]}"
        raise ApiError.bad_request(f"model is {model!r}, and {field} asks for other weights. Set model to {AUTO!r}", field)
    return Choice(named, wish.method, wish.density)


def _task_of_model(model: str, roster: Roster) -> str:
    try:
        return roster.task_of(model)
    except UnknownAdapter:
        known = [AUTO, BASE, *roster.adapters, *(adapter.name for adapter in roster.adapters.values())]
        message = f"no model named {model!r}. {closest(model, known)}"
        raise ApiError(404, message, param="model", code="model_not_found") from None


def _by_task(weights: Mapping[str, float], roster: Roster) -> dict[str, float]:
    by_task: dict[str, float] = {}
    for name, weight in weights.items():
        try:
            task = roster.task_of(name)
        except UnknownAdapter as error:
            field = f"composition.weights.{name}"
            raise ApiError(404, str(error), param=field, code="adapter_not_found") from None
        if task in by_task:
            raise ApiError.bad_request(
                f"composition.weights names the adapter of {task} twice", f"composition.weights.{name}"
            )
        by_task[task] = weight
    return by_task
