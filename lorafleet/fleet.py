"""A fleet in one process: base model, adapters and index, without Ray. What the endpoint does, a notebook can do here."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from lorafleet.adapters import Roster, stored_adapters
from lorafleet.composition import Composition
from lorafleet.config import MethodName, Settings, load_settings
from lorafleet.engine import Generation, GenerationRequest, OptionScore, ScoreRequest
from lorafleet.errors import AdapterError, CompositionError, SettingsError
from lorafleet.models import load_base_model, load_tokenizer
from lorafleet.placing import places_of
from lorafleet.retrieval import Encoder, Neighbour, open_index
from lorafleet.tasks import prompt_version
from lorafleet.weighing import BY_PLACE, Evidence, Places, Similar, TaskWeights, make_weigher

if TYPE_CHECKING:
    from lorafleet.composition import Adapter
    from lorafleet.engine import Engine

METHODS: tuple[str, ...] = get_args(MethodName)
LEAST_ADAPTERS = 8
SPARE_ROOM = 1.5
"""The room for prepared adapters, against what the fleet has: pruned and elected forms of some lie beside the plain ones."""


class Fleet:
    """A base model with a pool of adapters and the index of what they were trained on. Parts are loaded when first used.

    Example:
        fleet = Fleet.open("state/")
        fleet.route("Where can I buy a tennis ball?")
        fleet.generate(["Where can I buy a tennis ball?"], method="linear")
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._places: Places | None = None

    @classmethod
    def open(cls, state: str | Path = "state", config: Path | None = None) -> "Fleet":
        """The fleet whose index and adapters are in a folder.

        Raises:
            SettingsError: the settings file is wrong.
        """
        return cls(load_settings(config, state=Path(state)))

    @cached_property
    def roster(self) -> Roster:
        """The adapters in storage."""
        return stored_adapters(self.settings)

    @cached_property
    def engine(self) -> "Engine":
        """The base model with all adapters.

        Raises:
            AdapterError: an adapter cannot be loaded.
        """
        return load_engine(self.settings, self.roster)

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.settings.models)

    def neighbours(self, texts: Sequence[str], without: str | None = None) -> list[list[Neighbour]]:
        """The rows of the corpora that are nearest to each text, nearest first.

        Args:
            without: a task whose rows are left out.

        Raises:
            IndexUnavailable, IndexMismatch: the index cannot be read, or another encoder made it.
        """
        index = open_index(self.settings, prompt_version())
        embeddings = self._encoder.encode(texts, self.settings.index.encode_batch)
        return index.query(embeddings, self.settings.weighing.neighbours, without=without)

    def look_up(self, texts: Sequence[str]) -> list[tuple[list[Neighbour], TaskWeights]]:
        """The neighbours of each text, nearest first, and its task weights.

        Raises:
            IndexUnavailable, IndexMismatch: the index cannot be read, or another encoder made it.
        """
        index, weighing = open_index(self.settings, prompt_version()), self.settings.weighing
        embeddings = self._encoder.encode(texts, self.settings.index.encode_batch)
        found = index.query(embeddings, weighing.neighbours)
        if weighing.weigher not in BY_PLACE:
            return [(neighbours, self.weigh(neighbours)) for neighbours in found]
        self._places = places = places_of(index, self.settings.state, self._places)
        return [
            (neighbours, self.weigh(places.evidence(neighbours, embedding)))
            for neighbours, embedding in zip(found, embeddings, strict=True)
        ]

    def weigh(self, neighbours: Iterable[Similar]) -> TaskWeights:
        """Task weights of one query's neighbours, over the tasks that have an adapter.

        Args:
            neighbours: as an `Evidence` that says where the query lies, for a weigher that asks for it.

        Raises:
            SettingsError: it is such a weigher, and nothing says so.
        """
        weighing, known = self.settings.weighing, Evidence.of(neighbours)
        if weighing.weigher in BY_PLACE and known.embedding is None:
            problem = f"weighing.weigher is {weighing.weigher!r}, and neighbours do not say where their query lies"
            raise SettingsError(problem, "Give the text to look_up or route")
        weigher = make_weigher(weighing.weigher, weighing.model_dump())
        return weigher.weigh(known, among=self.roster.adapters or None)

    def route(self, text: str) -> TaskWeights:
        """Which tasks' adapters a query calls for, and how much of each."""
        return self.look_up([text])[0][1]

    def composition(self, weights: Mapping[str, float], method: str | None = None) -> Composition:
        """A composition by the settings' density and sign; adapters go by name or by task.

        Raises:
            CompositionError: the method is unknown.
            UnknownAdapter: a name is not in the fleet.
        """
        return make_composition(self.settings, self.roster, weights, method)

    def generate(
        self,
        prompts: Sequence[str],
        method: str | None = None,
        weights: Sequence[Mapping[str, float]] | None = None,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
    ) -> list[Generation]:
        """Continue prompts, every one with its own composition.

        Args:
            weights: of each prompt; found by retrieval where absent.
            stop: as in `GenerationRequest`.

        Returns:
            An answer for each prompt; one whose adapters overflow has an `error` in the place of a text.
        """
        weights = weights or [found for _, found in self.look_up(prompts)]
        limit, stops = max_tokens or self.settings.generation.max_tokens, tuple(stop)
        return self.engine.generate(
            [
                GenerationRequest(prompt, self.composition(row, method), limit, temperature, stop=stops)
                for prompt, row in zip(prompts, weights, strict=True)
            ]
        )

    def score(
        self,
        prompts: Sequence[str],
        options: Sequence[Sequence[str]],
        method: str | None = None,
        weights: Sequence[Mapping[str, float]] | None = None,
        note: Callable[[int], None] | None = None,
    ) -> list[list[OptionScore]]:
        """The log-likelihood of each option of each prompt, every prompt with its own composition."""
        weights = weights or [found for _, found in self.look_up(prompts)]
        requests = [
            ScoreRequest(prompt, tuple(choices), self.composition(row, method))
            for prompt, choices, row in zip(prompts, options, weights, strict=True)
        ]
        return self.engine.score(requests, note)


def load_engine(
    settings: Settings,
    roster: Roster,
    niceness: int = 0,
    gpu_share: float = 1.0,
    remembered: int = 0,
    prepared_share: float = 1.0,
    leave_out: Callable[[str, AdapterError], None] | None = None,
) -> "Engine":
    """The base model with a roster's adapters, each under its task's name.

    Args:
        niceness, gpu_share, remembered, prepared_share: as in `Engine`.
        leave_out: called with the task and the error of each adapter that cannot be loaded, which is left out then; without
            it, the error is raised.

    Raises:
        AdapterError: an adapter cannot be loaded.
    """
    # Not above: torch takes seconds to import, and who only makes compositions needs none.
    from lorafleet.composition import load_adapter, page_rank_for
    from lorafleet.engine import Engine

    generation = settings.generation
    adapters = []
    for stored in roster.adapters.values():
        with _left_out(stored.task, leave_out):
            adapters.append(load_adapter(stored.folder, stored.task))
    page_rank = page_rank_for([adapter.rank for adapter in adapters])
    pages = [math.ceil(adapter.rank / page_rank) for adapter in adapters]
    room = math.ceil(max(sum(pages), LEAST_ADAPTERS * max(pages, default=1)) * SPARE_ROOM)
    engine = Engine(
        load_base_model(settings.models),
        load_tokenizer(settings.models),
        max_prompt_tokens=generation.max_prompt_tokens,
        rows=generation.rows,
        longest=generation.longest,
        waiting=generation.waiting,
        prefill_tokens=generation.prefill_tokens,
        pages=math.ceil(generation.adapter_ranks / page_rank) if generation.adapter_ranks else room,
        page_rank=page_rank,
        cache_gib=generation.cache_gib,
        gpu_share=gpu_share,
        niceness=niceness,
        remembered=remembered,
        prepared_share=prepared_share,
    )
    for adapter in adapters:
        with _left_out(adapter.name, leave_out):
            add_adapter(engine, adapter)
    return engine


def add_adapter(engine: "Engine", adapter: "Adapter") -> None:
    """Take an adapter into an engine's pool.

    Raises:
        AdapterError: it does not fit the base model or its number format, or there is no room for it.
    """
    from lorafleet.composition import check_number_format

    check_number_format(adapter, engine.pool.pages.dtype)
    engine.pool.add(adapter)


@contextmanager
def _left_out(task: str, leave_out: Callable[[str, AdapterError], None] | None) -> Iterator[None]:
    try:
        yield
    except AdapterError as error:
        if leave_out is None:
            raise
        leave_out(task, error)


def make_composition(
    settings: Settings,
    roster: Roster,
    weights: Mapping[str, float],
    method: str | None = None,
    density: float | None = None,
) -> Composition:
    """A composition of adapters that go by name or by task; what is not said comes from the settings.

    Raises:
        CompositionError: the method is unknown, a weight is not finite, or the density is out of range.
        UnknownAdapter: a name is not in the roster.
    """
    composing = settings.composing
    chosen = method or composing.method
    if chosen not in METHODS:
        raise CompositionError(f"method is {chosen!r}", f"Known: {', '.join(METHODS)}")
    by_task = {roster.task_of(name): weight for name, weight in weights.items()}
    return Composition(chosen, by_task, composing.density if density is None else density, composing.majority_sign)
