"""Queries to their neighbours: one encoder in memory, and the index on its server."""

import asyncio
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve

from lorafleet.config import Settings
from lorafleet.errors import IndexUnavailable
from lorafleet.placing import places_of
from lorafleet.retrieval import CorpusIndex, Encoder, Vectors, open_index, server
from lorafleet.tasks import prompt_version
from lorafleet.weighing import BY_PLACE, Places
from serve.messages import Found, NearRow
from serve.placing import Placing

logger = logging.getLogger("ray.serve")

# What comes while a batch is computed makes the next one; to wait for more would only delay it.
BATCH_WAIT_SECONDS = 0.0
BATCHES = 2
"""At once: while the index is searched for one, the encoder has the next."""


@dataclass(frozen=True)
class Query:
    """A text, how many neighbours it gets, and whether their texts are wanted."""

    text: str
    neighbours: int
    texts: bool


@dataclass(frozen=True)
class Answer:
    """The rows near a query, and the query itself, float32 [dimensions]."""

    rows: tuple[NearRow, ...]
    embedding: Vectors


@serve.deployment(name="Retriever")
class Retriever:
    """Finds the rows of the corpora that are nearest to a query. Starts without an index, and finds it when it comes."""

    def __init__(self, settings: Settings) -> None:
        """Load the encoder.

        Raises:
            ModelError: it is not there, or cannot be loaded.
        """
        from torch import set_num_threads

        self._settings = settings
        # Beside generators on one GPU a query would wait for theirs to pause after each of the encoder's many kernels.
        gpus = settings.serving.retriever.gpus
        self._encoder = Encoder(settings.models.reserving(gpus))
        self._neighbours, self._weigher = settings.weighing.neighbours, settings.weighing.weigher
        self._index: CorpusIndex | None = None
        self._opening, self._encoding = asyncio.Lock(), asyncio.Lock()
        self._placing = Placing(self._learn)
        # On CPUs each by itself: in bfloat16 a vector depends a little on the texts that it is computed beside, and what
        # composes an answer must not depend on who else asks. Short questions gain little by being computed together there.
        on_cpu = self._encoder.device.type == "cpu"
        self._together = 1 if on_cpu else settings.index.encode_batch
        self._search.set_max_batch_size(settings.index.encode_batch)
        if on_cpu and not settings.serving.retriever.cpus:
            # Ray holds a replica that reserves no CPU to one thread, and a long question would take it half as long again.
            set_num_threads(len(os.sched_getaffinity(0)))
        if on_cpu:
            self._encoder.warm_up()
        logger.info(
            "%s was loaded in %s on %s; serving.retriever.gpus is %g",
            settings.models.encoder,
            str(self._encoder.dtype).removeprefix("torch."),
            self._encoder.device,
            gpus,
        )

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Change settings without a restart: `neighbours` and `weigher` of a query that does not say."""
        self._neighbours = int(user_config["neighbours"])
        self._weigher = str(user_config.get("weigher", self._weigher))

    async def find(self, text: str, neighbours: int | None = None, texts: bool = True, weigher: str | None = None) -> Found:
        """The neighbours of a text, and where it lies itself if its weigher asks for that.

        Args:
            neighbours: how many; as the settings say where absent.
            texts: whether theirs are wanted.
            weigher: by name; that of the settings where absent.

        Raises:
            IndexUnavailable, IndexMismatch: the index cannot be read, or another encoder made it.
        """
        start = time.perf_counter()
        answer = await self._search(Query(text, neighbours or self._neighbours, texts))
        if (weigher or self._weigher) not in BY_PLACE:
            return Found(answer.rows, 1000 * (time.perf_counter() - start))
        places = await self._placing.places()
        return Found(answer.rows, 1000 * (time.perf_counter() - start), answer.embedding, places.index)

    async def places(self) -> Places:
        """Where the tasks of the index lie.

        Raises:
            IndexUnavailable, IndexMismatch: as `find`.
        """
        return await self._placing.places()

    async def check_ready(self) -> None:
        """Refuse while there is nothing to search.

        Raises:
            IndexUnavailable, IndexMismatch: no server answers, or there are no rows in it, or those of another encoder.
        """
        index = await self._opened()
        if not await asyncio.to_thread(server.answers, self._settings.index):
            raise self._away()
        await asyncio.to_thread(index.check_filled)
        if self._weigher in BY_PLACE:
            await self._placing.places()

    @serve.batch(batch_wait_timeout_s=BATCH_WAIT_SECONDS, max_concurrent_batches=BATCHES)
    async def _search(self, queries: list[Query]) -> list[Answer]:
        index = await self._opened()
        async with self._encoding:
            texts = [query.text for query in queries]
            embeddings = await asyncio.to_thread(self._encoder.encode, texts, self._together)
        return await asyncio.to_thread(_near, index, queries, embeddings)

    async def _learn(self, last: Places | None) -> Places:
        index = await self._opened()
        return await asyncio.to_thread(places_of, index, self._settings.state, last)

    async def _opened(self) -> CorpusIndex:
        async with self._opening:
            if self._index is None:
                self._index = await asyncio.to_thread(self._open)
            return self._index

    def _open(self) -> CorpusIndex:
        # Never straight from its folder: the server that may come back at any time owns that.
        if not server.answers(self._settings.index):
            raise self._away()
        return open_index(self._settings, prompt_version())

    def _away(self) -> IndexUnavailable:
        return IndexUnavailable(f"no Chroma server answers at {self._settings.index.url}", "Start it: lorafleet up")


def _near(index: CorpusIndex, queries: Sequence[Query], embeddings: Vectors) -> list[Answer]:
    most, texts = max(query.neighbours for query in queries), any(query.texts for query in queries)
    found = index.query(embeddings, most, texts=texts)
    answers: list[Answer] = []
    for rows, embedding, query in zip(found, embeddings, queries, strict=True):
        near = (NearRow(row.task, row.text if query.texts else "", row.similarity) for row in rows[: query.neighbours])
        answers.append(Answer(tuple(near), embedding))
    return answers
