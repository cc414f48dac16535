"""What `model` and `composition` of a request mean together."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorafleet.adapters import Roster
from lorafleet.errors import UnknownAdapter, closest, shown
from lorafleet.weighing import MOST_PROTOTYPES, WEIGHERS, settings_of
from serve.errors import ApiError
from serve.json_body import MAX_NAME
from serve.protocol.requests import CompositionRequest, Retrieval

AUTO = "auto"
BASE = "base"
SETTINGS = ("p", "k", "temperature", "penalty")
"""What a request may set of its weigher."""
FOR_ALL = ("sharpness", "abstain_below")
"""What it may set whichever the weigher is."""


@dataclass(frozen=True)
class Wish:
    """How a request wants its weights to be found; None for what the settings say.

    Attributes:
        weigher: by name; `settings` are its own, or those that every weigher has.
        top_k: how many neighbours.
        neighbours: whether the answer is to show them.
        prefix: of the fields' names, in errors.
    """

    weigher: str | None = None
    settings: Mapping[str, float] = field(default_factory=dict)
    top_k: int | None = None
    neighbours: bool = False
    prefix: str = ""

    def check(self, weigher: str) -> None:
        """Refuse what the weigher that is to fulfil it does not have.

        Raises:
            ApiError: 400.
        """
        own = settings_of(weigher)
        for name in self.settings:
            if name not in own and name not in FOR_ALL:
                having = " or ".join(other for other in WEIGHERS if name in settings_of(other))
                raise ApiError.bad_request(
                    f"{self.prefix}{name} is given, and the weigher {weigher} has {' and '.join(own)}. "
                    f"Leave it out, or set {self.prefix}weigher to {having}",
                    f"{self.prefix}{name}",
                )
        if weigher == "sparse_projection" and self.settings.get("k", 0) > MOST_PROTOTYPES:
            field = f"{self.prefix}k"
            raise ApiError.bad_request(
                f"{field} is {self.settings['k']}. Allowed: at most {MOST_PROTOTYPES} with the weigher {weigher}", field
            )


@dataclass(frozen=True)
class Choice:
    """The composition that a request asks for.

    Attributes:
        weights: by task; None where retrieval finds them.
        method: None for the one of the settings; so is density.
        wish: how retrieval is to find weights.
    """

    weights: Mapping[str, float] | None = None
    method: str | None = None
    density: float | None = None
    wish: Wish = Wish()


def choose(model: str, composition: CompositionRequest | None, roster: Roster) -> Choice:
    """The composition of a request: an explicit one wins over `auto`, a model that is named wants no other weights.

    Raises:
        ApiError: 404 for a model or adapter that is not there, 400 where model and composition contradict each other, or
            the weigher that is named does not have the setting that is given.
    """
    request = composition or CompositionRequest()
    if model == AUTO:
        if request.weights is None:
            return Choice(None, request.method, request.density, wish_of(request, "composition."))
        return Choice(_by_task(request.weights, roster), request.method, request.density)
    named = {} if model == BASE else {task_of_model(model, roster): 1.0}
    contradicting = (("weights",) if request.weights is not None else ()) + request.by_retrieval
    if contradicting:
        field = f"composition.{contradicting[0]}"
        raise ApiError.bad_request(f"model is {model!r}, and {field} asks for other weights. Set model to {AUTO!r}", field)
    return Choice(named, request.method, request.density)


def wish_of(request: Retrieval, prefix: str = "") -> Wish:
    """How a request wants its weights to be found. Where it names no weigher, whoever knows which one it is checks it.

    Args:
        prefix: of the fields' names, in errors.

    Raises:
        ApiError: 400 for a setting that the weigher does not have.
    """
    given = {name: value for name in (*SETTINGS, *FOR_ALL) if (value := getattr(request, name)) is not None}
    wish = Wish(request.weigher, given, request.top_k, bool(request.neighbours), prefix)
    if wish.weigher is not None:
        wish.check(wish.weigher)
    return wish


def task_of_model(model: str, roster: Roster) -> str:
    """The task of an adapter that `model` names.

    Raises:
        ApiError: 404, with the names most like it.
    """
    try:
        return roster.task_of(model)
    except UnknownAdapter:
        known = [AUTO, BASE, *roster.adapters, *(adapter.name for adapter in roster.adapters.values())]
        message = f"no model named {shown(model)}. {closest(model[:MAX_NAME], known)}"
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
