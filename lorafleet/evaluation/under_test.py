"""The methods under test: which composition each one gives a row. A further one is a line in `UNDER_TEST`.

A method may be measured with other settings than the fleet's, by its name and what is changed: `linear@p=0.5`,
`softmax@k=5@temperature=0.1`, `cat@query=bare`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from lorafleet.composition import BASE, Composition
from lorafleet.config import Composing, Evaluation, Section, Settings, Weighing, parse_yaml
from lorafleet.errors import SettingsError, closest
from lorafleet.evaluation.answering import Answer, by_engine
from lorafleet.evaluation.averaging import averaged
from lorafleet.evaluation.bench import Bench, Rows
from lorafleet.evaluation.lorahub import lorahub
from lorafleet.evaluation.soup import soup
from lorafleet.weighing import BY_PLACE, LEARNED, TaskWeights, make_weigher

Setting = Literal["iid", "ood", "held_out"]
SETTINGS: tuple[Setting, ...] = ("iid", "ood", "held_out")
KNOBS: Mapping[str, str] = {
    **dict.fromkeys(Weighing.model_fields, "weighing"),
    "density": "composing",
    "majority_sign": "composing",
    "query": "evaluation",
}
"""What a variant may change, and the section of the settings that it stands in."""

ALL = 10**6
"""More adapters than any pool has."""

Compose = Callable[[Bench, Rows, Settings], Sequence[Composition]]
AnswerRows = Callable[[Bench, Rows, Sequence[Composition]], list[Answer]]
Combine = Callable[[Bench, TaskWeights, Settings], Composition]


@dataclass(frozen=True)
class MethodUnderTest:
    """A line of the table.

    Attributes:
        compose: gives every row its composition, under a variant's settings.
        retrieves: whether it needs the rows' neighbours.
        adapters: which it may use: none, the row's own, or any of the pool.
        own_rows: what training rows of the row's own task are to it, with the own adapter masked too; where they are
            "needed", tasks without them are left out.
        settings: where it has a meaning: with the own adapter in the pool ("iid"), with it masked ("ood"), on tasks without
            an adapter ("held_out").
        fixed: its own values of what a variant may change.
        answer: computes the answers; by the engine, unless it has to do otherwise.
    """

    compose: Compose
    retrieves: bool = True
    adapters: Literal["none", "own", "pool"] = "pool"
    own_rows: Literal["unused", "used", "needed"] = "unused"
    settings: tuple[Setting, ...] = SETTINGS
    fixed: Mapping[str, Any] = field(default_factory=dict)
    answer: AnswerRows = by_engine


@dataclass(frozen=True)
class Variant:
    """A method under test with the settings that its name asks for.

    Attributes:
        name: as it was given, such as `linear@p=0.5`.
        changes: what it changes in the fleet's settings.
    """

    name: str
    method: MethodUnderTest
    changes: Mapping[str, Any]

    def apply(self, settings: Settings) -> Settings:
        """The fleet's settings, with the method's own values and what the name changes.

        Raises:
            SettingsError: a value is not allowed.
        """
        sections: dict[str, dict[str, Any]] = {}
        for knob, value in {**self.method.fixed, **self.changes}.items():
            sections.setdefault(KNOBS[knob], {})[knob] = value
        kinds: dict[str, type[Section]] = {"weighing": Weighing, "composing": Composing, "evaluation": Evaluation}
        changed: dict[str, Section] = {}
        for section, values in sections.items():
            try:
                changed[section] = kinds[section].model_validate({**getattr(settings, section).model_dump(), **values})
            except ValidationError as error:
                first = error.errors()[0]
                knob, message = str(first["loc"][0]), first["msg"].removeprefix("Input should be ")
                raise SettingsError(f"method {self.name}: {knob} is {first['input']!r}", f"Allowed: {message}") from None
        return settings.model_copy(update=changed)


def variant(name: str) -> Variant:
    """The method under test that a name asks for.

    Raises:
        SettingsError: there is none, or it has no such setting.
    """
    plain, *changes = name.split("@")
    if plain not in UNDER_TEST:
        raise SettingsError(f"no method under test named {plain!r}", closest(plain, UNDER_TEST))
    found: dict[str, Any] = {}
    for change in changes:
        knob, equals, value = change.partition("=")
        if not equals or knob not in KNOBS:
            raise SettingsError(f"method {name}: cannot change {change!r}", f"Write name=value; known: {', '.join(KNOBS)}")
        try:
            found[knob] = parse_yaml(value)
        except ValueError:
            raise SettingsError(f"method {name}: {knob} is {value!r}", "Write a number, a name or true") from None
    return Variant(name, UNDER_TEST[plain], found)


def by_retrieval(bench: Bench, rows: Rows, settings: Settings) -> list[Composition]:
    """Every row's neighbours, weighed and combined as the settings say."""
    return [bench.composition(row, settings) for row in retrieved_weights(bench, rows, settings)]


def retrieved_weights(bench: Bench, rows: Rows, settings: Settings) -> list[TaskWeights]:
    """Every row's task weights by the settings' weigher, over the adapters within reach."""
    weighing, form = settings.weighing, settings.evaluation.query
    weigher = make_weigher(weighing.weigher, weighing.model_dump())
    pool = bench.pool(rows.masked)
    if weighing.weigher in BY_PLACE:
        known = bench.evidence(rows, weighing.neighbours, form, learned=weighing.weigher in LEARNED)
        return [weigher.weigh(evidence, among=pool) for evidence in known]
    return [weigher.weigh(neighbours, among=pool) for neighbours in bench.neighbours(rows, weighing.neighbours, form)]


def weighed(method: str, weigher: str = "nucleus") -> MethodUnderTest:
    """A method of composition over the weights of a weigher."""

    def compose(bench: Bench, rows: Rows, settings: Settings) -> list[Composition]:
        return [bench.composition(row, settings, method) for row in retrieved_weights(bench, rows, settings)]

    return MethodUnderTest(compose, fixed={"weigher": weigher})


def outputs_added(bench: Bench, weights: TaskWeights, settings: Settings) -> Composition:
    """The adapters' outputs, added up by their weights."""
    return bench.composition(weights, settings, "cat")


def by_place(weigher: str, combine: Combine = outputs_added, **fixed: Any) -> MethodUnderTest:
    """Compositions over the weights that follow from where a query lies among the tasks.

    Args:
        weigher: a name in `BY_PLACE`; `fixed` are settings of its own.
    """

    def compose(bench: Bench, rows: Rows, settings: Settings) -> list[Composition]:
        return [combine(bench, weights, settings) for weights in retrieved_weights(bench, rows, settings)]

    return MethodUnderTest(compose, fixed={"weigher": weigher, **fixed})


def _base(bench: Bench, rows: Rows, settings: Settings) -> list[Composition]:
    return [BASE] * len(rows.examples)


def _own(bench: Bench, rows: Rows, settings: Settings) -> list[Composition]:
    return [bench.composition({rows.task.name: 1.0}, settings, "cat")] * len(rows.examples)


def _everyone(bench: Bench, rows: Rows, settings: Settings) -> list[Composition]:
    pool = bench.pool(rows.masked)
    return [bench.composition(dict.fromkeys(pool, 1 / len(pool)), settings, "cat")] * len(rows.examples)


def _multitask(bench: Bench, rows: Rows, settings: Settings) -> list[Composition]:
    if bench.multitask is None:
        raise SettingsError(
            "multitask_lora: evaluation.multitask is not set", "Name the adapter that was trained on everything"
        )
    return [bench.composition({bench.multitask: 1.0}, settings, "cat")] * len(rows.examples)


def _token_by_token(bench: Bench, rows: Rows, settings: Settings) -> list[Composition]:
    """What a router in every layer picks from; its weights are another for each token, these say which there are."""
    pool = bench.pool(rows.masked)
    return [Composition("arrow", dict.fromkeys(pool, 1 / len(pool)))] * len(rows.examples)


def _by_arrow(bench: Bench, rows: Rows, compositions: Sequence[Composition]) -> list[Answer]:
    prompts = [example.prompt for example in rows.examples]
    bench.arrow.take(list(compositions[0].weights))
    if rows.task.answers is None:
        scored = bench.arrow.score(prompts, [example.options for example in rows.examples])
        return [Answer(one, scores) for one, scores in zip(compositions, scored, strict=True)]
    texts = bench.arrow.generate(prompts, bench.settings.evaluation.answer_tokens)
    return [Answer(one, text=text) for one, text in zip(compositions, texts, strict=True)]


UNDER_TEST: dict[str, MethodUnderTest] = {
    "base": MethodUnderTest(_base, retrieves=False, adapters="none"),
    "perfect": MethodUnderTest(_own, retrieves=False, adapters="own", settings=("iid",)),
    "auto": MethodUnderTest(by_retrieval),
    "selection": weighed("selection", "top_k"),
    "fusion": weighed("fusion", "uniform"),
    "mixture": weighed("mixture", "uniform"),
    "linear": weighed("linear"),
    "cat": weighed("cat"),
    "ties": weighed("ties"),
    "magnitude_prune": weighed("magnitude_prune"),
    "dare_linear": weighed("dare_linear"),
    "dare_ties": weighed("dare_ties"),
    "svd": weighed("svd"),
    "top_k": weighed("cat", "top_k"),
    "softmax": weighed("cat", "softmax"),
    "prototypes": by_place("prototypes"),
    "sparse_projection": by_place("sparse_projection"),
    "moe_top1": by_place("routed", k=1),
    "moe_top3": by_place("routed", k=3),
    "joint": by_place("joint"),
    "moe_soft": by_place("routed", k=ALL),
    "smear": by_place("routed", averaged, k=ALL),
    "adapter_soup": MethodUnderTest(soup, own_rows="used"),
    "lorahub": MethodUnderTest(lorahub, own_rows="needed"),
    "arrow": MethodUnderTest(_token_by_token, retrieves=False, answer=_by_arrow),
    "uniform": MethodUnderTest(_everyone, retrieves=False),
    # Whoever was trained on everything has seen the masked task.
    "multitask_lora": MethodUnderTest(_multitask, retrieves=False, settings=("iid", "held_out")),
}
"""By name: `auto` is what the endpoint does by its settings, `uniform` every adapter the same whatever the query."""
