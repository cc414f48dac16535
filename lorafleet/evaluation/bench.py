"""The bench: the fleet that is measured, and what a method under test may use of it. Parts are loaded when first used."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorafleet.adapters import Roster, stored_adapters
from lorafleet.composition import Composition
from lorafleet.config import Settings
from lorafleet.engine import Engine
from lorafleet.errors import SettingsError, UnknownAdapter
from lorafleet.evaluation.queries import QueryForm, query_text
from lorafleet.fleet import load_engine, make_composition
from lorafleet.models import pick_device
from lorafleet.retrieval import Encoder, ExactIndex, Neighbour, Vectors, open_index
from lorafleet.storage import check_writable, file_in_one_step
from lorafleet.tasks import (
    Catalogue,
    Example,
    Task,
    TaskCorpus,
    load_catalogue,
    load_corpus,
    prompt_version,
    texts_to_embed,
)
from lorafleet.tasks.task import Split
from lorafleet.weighing import Evidence, Places, Prototypes, learn_places, read_places, write_places

if TYPE_CHECKING:
    from lorafleet.evaluation.arrow import ArrowModel
    from lorafleet.retrieval import Manifest

GPU_ROWS = 128
GPU_PASS_TOKENS = 8192
REMEMBERED_ROWS = 4096
"""Rows, and options, whose tokens are kept: every method asks the same rows of a task, one after the other."""


@dataclass(frozen=True)
class Rows:
    """Rows of one task that a method is to answer.

    Attributes:
        masked: the task whose adapter and training rows are out of reach, where one is.
    """

    task: Task
    split: Split
    examples: tuple[Example, ...]
    masked: str | None = None


class Bench:
    """A fleet to be measured.

    Args:
        limit: at most so many rows a task that are measured.
    """

    def __init__(self, settings: Settings, limit: int | None = None) -> None:
        self.settings, self.limit = settings, limit
        self._corpora: dict[tuple[str, Split], TaskCorpus] = {}
        self._embedded: dict[tuple[str, Split, int, QueryForm], Vectors] = {}
        self._found: dict[tuple[str, Split, int, str | None, int, QueryForm], list[list[Neighbour]]] = {}

    @cached_property
    def folder(self) -> Path:
        """Where what is measured is kept; runs over a part of the rows have a place of their own."""
        folder = self.settings.evaluation.folder or self.settings.state / "evaluation"
        return folder if self.limit is None else folder.with_name(f"{folder.name}-first-{self.limit}")

    def check_writable(self) -> None:
        """Refuse folders that cannot be written, before anything is computed.

        Raises:
            SettingsError: one cannot be written.
        """
        hint = "Give another with --set evaluation.folder=DIR, or let this user write there; --from DIR only reads"
        for folder in (self.folder, self._vectors):
            check_writable(folder, "evaluation.folder", hint)

    @cached_property
    def _vectors(self) -> Path:
        """Where embedded training rows are kept, and what was learned from them."""
        return self.folder.parent / "evaluation-keys"

    @cached_property
    def tasks(self) -> Catalogue:
        """The tasks to be measured."""
        return load_catalogue(self.settings.tasks)

    @cached_property
    def everything(self) -> Catalogue:
        """All tasks, those that are not measured among them: their adapters are in the pool too."""
        return load_catalogue(self.settings.tasks.model_copy(update={"names": None}))

    @cached_property
    def roster(self) -> Roster:
        """The adapters in storage."""
        return stored_adapters(self.settings)

    @cached_property
    def multitask(self) -> str | None:
        """What the adapter that was trained on everything is called in weights; None where there is none.

        Raises:
            UnknownAdapter: the settings name one that is not in storage.
        """
        name = self.settings.evaluation.multitask
        return None if name is None else self.roster.task_of(name)

    @cached_property
    def together(self) -> frozenset[str]:
        """What adapters trained on the rows of all tasks are called in weights: they have seen whatever is masked."""
        cards = {task: adapter.card for task, adapter in self.roster.adapters.items()}
        trained = {task for task, card in cards.items() if card is not None and card.training.get("together") == task}
        return frozenset({*trained, *([self.multitask] if self.multitask else [])})

    @cached_property
    def engine(self) -> Engine:
        """The base model with all adapters, with room for many rows at once.

        Raises:
            AdapterError: an adapter cannot be loaded.
        """
        chosen, generation = self.settings.evaluation, self.settings.generation
        gpu = pick_device(self.settings.models.device).type == "cuda"
        bounds = {
            "rows": chosen.rows or (GPU_ROWS if gpu else generation.rows),
            "prefill_tokens": chosen.pass_tokens or (GPU_PASS_TOKENS if gpu else generation.prefill_tokens),
        }
        settings = self.settings.model_copy(update={"generation": generation.model_copy(update=bounds)})
        # Several workers, or processes that share the work, may have one GPU together.
        share = min(1.0, chosen.gpus_per_worker or 1.0)
        return load_engine(settings, self.roster, gpu_share=share, remembered=REMEMBERED_ROWS)

    @cached_property
    def arrow(self) -> "ArrowModel":
        """The base model once more, with all adapters and a router in every layer.

        Raises:
            AdapterError: the adapters are not alike.
        """
        # It brings PEFT along, which takes seconds.
        from lorafleet.evaluation.arrow import ArrowModel

        return ArrowModel(self.settings, [self.roster.adapters[task] for task in self.pool()])

    @cached_property
    def encoder(self) -> Encoder:
        """The sentence encoder."""
        return Encoder(self.settings.models)

    def pool(self, masked: str | None = None) -> list[str]:
        """The tasks whose adapters a method may use.

        Raises:
            UnknownAdapter: there is none.
        """
        tasks = [task for task in self.roster.adapters if task != masked and task not in self.together]
        if not tasks:
            raise UnknownAdapter("there are no adapters to compose", "Train some first: lorafleet train")
        return tasks

    def corpus(self, task: str, split: Split) -> TaskCorpus:
        """The rows of a task's split."""
        if (task, split) not in self._corpora:
            settings = self.settings.tasks
            if split == "evaluation" and self.limit is not None:
                settings = settings.model_copy(update={"rows_per_task": self.limit})
            self._corpora[task, split] = load_corpus(self.everything[task], split, settings)
        return self._corpora[task, split]

    def rows(self, task: str, split: Split = "evaluation", masked: bool = False) -> Rows:
        """The rows of a task that are measured: all of the evaluation split, of the others a bounded number.

        Args:
            masked: whether the task's own adapter and training rows are out of reach.
        """
        corpus = self.corpus(task, split)
        most = self.settings.evaluation.scoring_rows
        bound = None if split == "evaluation" else min(most, self.limit or most)
        return Rows(corpus.task, split, corpus.examples[:bound], task if masked else None)

    @cached_property
    def indexed(self) -> list[str]:
        """The tasks whose training rows are searched: those that have an adapter."""
        return [task.name for task in self.everything.trained if task.name in self.roster.adapters]

    def keys(self, task: str) -> Vectors:
        """A task's training rows as the settings embed them, float32 [rows, dimensions]; kept on disk."""
        corpus = self.corpus(task, "train")
        index = self.settings.index
        name = "-".join((task, corpus.fingerprint, self.encoder.fingerprint[:16], *index.embedded))
        path = self._vectors / f"{name}.npy"
        if path.is_file():
            kept: Vectors = np.load(path)
            return kept
        texts = [texts_to_embed(corpus.task, example, index) for example in corpus.examples]
        vectors = self.encoder.encode_rows(texts, index.encode_batch)
        with file_in_one_step(path) as file:
            np.save(file, vectors)
        return vectors

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Texts as unit vectors, float32 [texts, dimensions]."""
        return self.encoder.encode(texts, self.settings.index.encode_batch)

    @cached_property
    def exact_index(self) -> ExactIndex:
        """The training rows of the pool's tasks in memory.

        Raises:
            SettingsError: no task of the pool has training rows.
        """
        if not self.indexed:
            raise SettingsError("no adapter of the pool belongs to a task with training rows", "Set evaluation.search=index")
        texts = {task: [example.key for example in self.corpus(task, "train").examples] for task in self.indexed}
        return ExactIndex(texts, {task: self.keys(task) for task in self.indexed})

    def nearest(self, embeddings: Vectors, count: int, masked: str | None = None) -> list[list[Neighbour]]:
        """The training rows nearest to embedded texts, by the search of the settings."""
        if self.settings.evaluation.search == "index":
            return open_index(self.settings, prompt_version()).query(embeddings, count, without=masked)
        return self.exact_index.query(embeddings, count, without=masked)

    def embeddings(self, rows: Rows, form: QueryForm) -> Vectors:
        """Rows embedded as queries of a form, float32 [rows, dimensions]."""
        key = rows.task.name, rows.split, len(rows.examples), form
        if key not in self._embedded:
            self._embedded[key] = self.embed([query_text(rows.task, example, form) for example in rows.examples])
        return self._embedded[key]

    def neighbours(self, rows: Rows, count: int, form: QueryForm) -> list[list[Neighbour]]:
        """The training rows nearest to each row, nearest first; none of the masked task, and never the row itself."""
        key = rows.task.name, rows.split, len(rows.examples), rows.masked, count, form
        if key not in self._found:
            spare = int(rows.split == "train")
            found = self.nearest(self.embeddings(rows, form), count + spare, rows.masked)
            if spare:
                pairs = zip(found, rows.examples, strict=True)
                found = [[one for one in near if one.text != example.key][:count] for near, example in pairs]
            self._found[key] = found
        return self._found[key]

    @cached_property
    def searched(self) -> "Manifest | None":
        """The index that is searched; None where training rows are searched exactly.

        Raises:
            IndexUnavailable, IndexMismatch: it cannot be read, or another encoder made it.
        """
        return open_index(self.settings, prompt_version()).manifest() if self.settings.evaluation.search == "index" else None

    @cached_property
    def prototypes(self) -> Prototypes:
        """The means of the tasks' training rows, as they are embedded."""
        return Prototypes.of({task: self.keys(task).mean(axis=0) for task in self.indexed})

    @cached_property
    def places(self) -> Places:
        """What has learned from the same rows which task they belong to, as the endpoint learns it; kept on disk."""
        corpora = [(task, self.corpus(task, "train").fingerprint) for task in self.indexed]
        described = json.dumps([corpora, self.encoder.fingerprint, *self.settings.index.embedded])
        name = sha256(described.encode()).hexdigest()[:32]
        path = self._vectors / f"{name}.npz"
        kept = read_places(path, name)
        if kept is None:
            keys = ((task, self.keys(task)) for task in self.indexed)
            kept = learn_places((([task] * len(vectors), vectors) for task, vectors in keys), name)
            write_places(path, kept)
        return kept

    def evidence(self, rows: Rows, count: int, form: QueryForm, learned: bool = False) -> list[Evidence]:
        """Each row's neighbours, where it lies among the prototypes, and, with `learned`, the router."""
        places = self.places if learned else Places(self.prototypes)
        pairs = zip(self.neighbours(rows, count, form), self.embeddings(rows, form), strict=True)
        return [places.evidence(neighbours, embedding) for neighbours, embedding in pairs]

    def forget(self) -> None:
        """Let go of the neighbours of rows that are done with."""
        self._found.clear()
        self._embedded.clear()

    def composition(self, weights: Mapping[str, float], settings: Settings, method: str | None = None) -> Composition:
        """A composition by a variant's settings."""
        return make_composition(settings, self.roster, weights, method)

    def close(self) -> None:
        """End the engine, where it was loaded."""
        if "engine" in self.__dict__:
            self.engine.close()
