"""The pool, live: adapters come in and go while requests are answered.

An adapter that comes in is copied beside the others and checked, loaded by every generator, its rows are written to the
index, its folder is renamed, and then it is shown. Renaming is what counts: before it, everything is undone, whoever fails;
after it, the adapter is there for every replica that starts. One that goes is hidden, requests on their way are waited for,
generators drop it, and rows and folder are deleted.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any, TypeVar

from ray import serve

from lorafleet.adapters import AddedRecord, Roster, StoredAdapter, stored_adapter, stored_adapters, write_record
from lorafleet.config import Settings
from lorafleet.errors import AdapterError, IndexMismatch, IndexUnavailable, UnknownAdapter
from lorafleet.models import fingerprint
from lorafleet.retrieval import Encoder, Entry, Vectors, open_for_writing, row_identifiers
from lorafleet.tasks import load_catalogue, prompt_version
from serve.admission import (
    NewRow,
    check_adapter,
    check_folder,
    check_name,
    copy_in,
    read_new_rows,
    resolved,
    taken,
    writing,
)
from serve.errors import AWAY_RETRY_SECONDS, SERVER_ERROR, ApiError, sentence
from serve.follower import POLL_SECONDS, Published, Standing
from serve.journal import Change, Journal
from serve.protocol.requests import AdapterRequest
from serve.standings import ReplicaFailed, ReplicaLate, Standings

logger = logging.getLogger("ray.serve")

SHOWN_BY = ("weigher", "gateway")
SETTLE_SECONDS = 2.0
Answer = TypeVar("Answer")


@serve.deployment(
    name="Pool",
    num_replicas=1,
    max_ongoing_requests=10_000,
    ray_actor_options={"num_cpus": 0},
    # Every replica asks every few seconds.
    logging_config={"enable_access_log": False},
)
class Pool:
    """Owns the folder of the adapters, and says what is in the pool. One change at a time."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]
        """Read what is in storage, and undo or finish what another one before has left half done."""
        self._settings = settings
        self._journal = Journal(settings.adapters)
        self._standings = Standings()
        self._news = asyncio.Event()
        self._change: asyncio.Task[Any] | None = None
        await asyncio.to_thread(self._journal.lock)
        left = await asyncio.to_thread(self._journal.read)
        roster = await asyncio.to_thread(stored_adapters, settings)
        if left is not None and left.action == "remove":
            roster = _without(roster, left.name)
        # Larger than that of a pool before, so that replicas take it for news.
        self._published = Published(time.time_ns(), roster, roster)
        if left is not None:
            self._begin(self._settle(left))

    async def follow(self, standing: Standing) -> Published:
        """What is in the pool; where a replica has seen that, its answer waits for news."""
        self._standings.note(standing)
        if standing.seen == self._published.version:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), POLL_SECONDS)
        return self._published

    async def note(self, standing: Standing) -> None:
        """A sign of life."""
        self._standings.note(standing)

    async def left_out(self) -> Mapping[str, str]:
        """The adapters of the pool that a generator cannot load, by task, with the reason of one."""
        return self._standings.left_out

    async def add(self, newcomer: AdapterRequest) -> StoredAdapter:
        """Take an adapter in; it is there for every request when this returns.

        Raises:
            ApiError: 400 for an adapter that is not taken, 409 for a name that is, or while another change is under way,
                503 where a replica does not follow.
            IndexUnavailable, IndexMismatch: its rows cannot be written.
        """
        return await self._alone(self._add(newcomer))

    async def remove(self, name: str) -> StoredAdapter:
        """Take an adapter out by its name or task; requests that began before are answered as ever.

        Raises:
            ApiError: 404 for an adapter that is not there, 409 while another change is under way.
            IndexUnavailable, IndexMismatch: its rows cannot be deleted yet; it is no longer in the pool.
        """
        return await self._alone(self._remove(name))

    async def _alone(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        if self._change is not None:
            work.close()
            message = "another adapter comes in or goes just now. Try again in a moment"
            raise ApiError(409, message, code="change_under_way", retry_after=AWAY_RETRY_SECONDS)
        # Whoever asked may hang up: a change that was begun goes on.
        return await asyncio.shield(self._begin(work))

    def _begin(self, work: Coroutine[Any, Any, Answer]) -> "asyncio.Task[Answer]":
        task = asyncio.get_running_loop().create_task(work)
        self._change = task
        task.add_done_callback(self._over)
        return task

    def _over(self, task: "asyncio.Task[Any]") -> None:
        self._change = None
        error = None if task.cancelled() else task.exception()
        if error is not None:
            logger.warning("the pool was not changed: %s", error.message if isinstance(error, ApiError) else error)
        try:
            left = self._journal.read()
        except AdapterError as error:
            logger.error("%s", sentence(error))
            return
        if left is not None:
            self._begin(self._settle(left))

    async def _add(self, newcomer: AdapterRequest) -> StoredAdapter:
        settings, journal = self._settings, self._journal
        check_name(newcomer, self._published.loaded, settings.adapters)
        source = resolved(newcomer.source, "source", settings)
        await asyncio.to_thread(check_folder, source, settings)
        rows = await asyncio.to_thread(read_new_rows, newcomer, settings)
        if rows and await asyncio.to_thread(self._has_rows, newcomer.task_name):
            raise taken("task", newcomer.task_name, "by rows in the index: leave rows and corpus out to use those, or")
        change = Change("add", newcomer.name, newcomer.task_name, bool(rows))
        beside = journal.incoming(newcomer.name)
        with writing():
            journal.begin(change)
        try:
            await asyncio.to_thread(copy_in, source, beside, settings)
            await asyncio.to_thread(check_adapter, beside, newcomer, settings)
            record = self._record(newcomer, len(rows))
            with writing():
                write_record(beside, record)
            vectors = await asyncio.to_thread(self._embedded, rows) if rows else None
            coming = stored_adapter(beside)
            version = self._publish(loaded=self._published.loaded.having(coming))
            await self._loaded_everywhere(version)
            if vectors is not None:
                await asyncio.to_thread(self._write_rows, newcomer.task_name, rows, vectors)
            with writing():
                beside.rename(journal.place(newcomer.name))
        except BaseException:
            # What cannot be undone while the index is away, or the disk is, is settled later.
            with suppress(IndexUnavailable, IndexMismatch, OSError):
                await self._undo(change)
            raise
        with writing():
            journal.end()
        adapter = replace(coming, folder=journal.place(newcomer.name))
        version = self._publish(loaded=self._published.loaded.having(adapter), shown=self._published.shown.having(adapter))
        await self._heeded(SHOWN_BY, lambda standing: standing.has == version, version, settings.serving.adapter_seconds)
        logger.info("adapter %s came in for the task %s, with %d rows", adapter.name, adapter.task, len(rows))
        return adapter

    async def _remove(self, name: str) -> StoredAdapter:
        roster = self._published.loaded
        try:
            adapter = roster.adapters[roster.task_of(name)]
        except UnknownAdapter as error:
            raise ApiError(404, sentence(error), param="name", code="adapter_not_found") from None
        rows = adapter.rows != 0
        if rows:
            # An index that is away is told before anything is done.
            await asyncio.to_thread(self._has_rows, adapter.task)
        change = Change("remove", adapter.name, adapter.task, rows)
        with writing():
            self._journal.begin(change)
            await self._finish_removal(change)
        logger.info("adapter %s was removed", adapter.name)
        return adapter

    async def _settle(self, change: Change) -> None:
        """Undo an add that was not finished, or finish a removal, however long the index is away."""
        while True:
            try:
                if change.action == "remove":
                    await self._finish_removal(change)
                elif self._journal.place(change.name).exists():
                    self._journal.end()
                else:
                    await self._undo(change)
            except Exception as error:
                logger.warning("the change of %s is not settled yet: %s", change.name, error)
            if self._journal.read() is None:
                return
            await asyncio.sleep(SETTLE_SECONDS)

    async def _undo(self, change: Change) -> None:
        """Leave everything as it was before an add."""
        self._publish(loaded=_without(self._published.loaded, change.name))
        if change.rows:
            await asyncio.to_thread(self._delete_rows, change.task)
        await asyncio.to_thread(self._journal.sweep)
        self._journal.end()

    async def _finish_removal(self, change: Change) -> None:
        serving, journal = self._settings.serving, self._journal
        hidden = self._publish(shown=_without(self._published.shown, change.name), removing=frozenset({change.name}))
        await self._heeded(SHOWN_BY, lambda standing: standing.has == hidden, hidden, serving.adapter_seconds)
        drained = serving.request_timeout_seconds
        await self._heeded(("gateway",), lambda standing: standing.drained == hidden, hidden, drained)
        if journal.place(change.name).exists():
            journal.place(change.name).rename(journal.leaving(change.name))
        roster = _without(self._published.loaded, change.name)
        # Of a task with several adapters another one comes to light.
        stored = await asyncio.to_thread(stored_adapters, self._settings)
        if change.task in stored.adapters:
            roster = roster.having(stored.adapters[change.task])
        version = self._publish(loaded=roster)
        await self._heeded(("generator",), lambda standing: standing.has == version, version, serving.adapter_seconds)
        if change.rows and change.task not in roster.adapters:
            await asyncio.to_thread(self._delete_rows, change.task)
        await asyncio.to_thread(journal.sweep)
        journal.end()
        self._publish(shown=roster, removing=frozenset())

    async def _loaded_everywhere(self, version: int) -> None:
        seconds = self._settings.serving.adapter_seconds
        try:
            await self._standings.everyone(("generator",), lambda standing: standing.has == version, version, seconds)
        except ReplicaFailed as error:
            raise ApiError.bad_request(f"source cannot be loaded: {error}", "source") from None
        except ReplicaLate as error:
            raise ApiError(503, f"{error}. Try again", SERVER_ERROR, code="late", retry_after=AWAY_RETRY_SECONDS) from None

    async def _heeded(self, kinds: Any, reached: Callable[[Standing], bool], version: int, seconds: float) -> None:
        """Wait for replicas to follow where there is no way back: one that does not is left behind."""
        try:
            await self._standings.everyone(kinds, reached, version, seconds)
        except (ReplicaFailed, ReplicaLate) as error:
            logger.warning("the pool goes on without waiting longer: %s", error)

    def _publish(self, **changes: Any) -> int:
        """Tell the replicas, and say which version it is."""
        self._published = replace(self._published, version=self._published.version + 1, **changes)
        # Who waits has been told; who comes now waits for the next.
        self._news.set()
        self._news = asyncio.Event()
        return self._published.version

    def _record(self, newcomer: AdapterRequest, rows: int) -> AddedRecord:
        models = self._settings.models
        catalogue = load_catalogue(self._settings.tasks.model_copy(update={"names": None}))
        return AddedRecord(
            name=newcomer.name,
            task=newcomer.task_name,
            family=catalogue[newcomer.task_name].family if newcomer.task_name in catalogue else None,
            rows=rows,
            base_fingerprint=fingerprint(models.base, models.base_revision),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def _has_rows(self, task: str) -> bool:
        index = open_for_writing(self._settings, prompt_version())
        index.check()
        return bool(index.identifiers(task))

    def _embedded(self, rows: list[NewRow]) -> Vectors:
        # Not kept: adapters come in rarely, and an encoder takes memory.
        encoder = Encoder(self._settings.models.reserving(0))
        return encoder.encode_rows([row.texts for row in rows], self._settings.index.encode_batch)

    def _write_rows(self, task: str, rows: list[NewRow], vectors: Vectors) -> None:
        identifiers = row_identifiers(task, (row.texts for row in rows))
        entries = [Entry(identifier, task, row.key) for identifier, row in zip(identifiers, rows, strict=True)]
        open_for_writing(self._settings, prompt_version()).write(entries, vectors)

    def _delete_rows(self, task: str) -> None:
        open_for_writing(self._settings, prompt_version()).delete_task(task)


def _without(roster: Roster, name: str) -> Roster:
    """A roster without the adapter of that name; another one of its task stays."""
    return Roster(adapter for adapter in roster.adapters.values() if adapter.name != name)
