"""Requests that arrive one by one become batches for the engine.

Ray Serve's `serve.batch` closes a batch when its wait is over, also while the engine is at work, so that a busy engine
finds a queue of small batches. Here a batch is closed when the engine is free to take it: the busier, the fuller.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


@dataclass
class _Waiting(Generic[Asked, Answer]):
    asked: Asked
    answer: "asyncio.Future[tuple[Answer, float]]"
    since: float = field(default_factory=time.perf_counter)


class Batcher(Generic[Asked, Answer]):
    """Runs batches in a thread of its own, one after the other.

    Args:
        run: answers a batch in order; an answer that is an exception fails its request alone.
        size: at most so many in a batch.
        wait_seconds: how long an idle engine waits for more after the first.
    """

    def __init__(
        self, run: Callable[[Sequence[Asked]], Sequence[Answer | Exception]], size: int, wait_seconds: float
    ) -> None:
        self._run, self._size, self._wait_seconds = run, size, wait_seconds
        self._queue: asyncio.Queue[_Waiting[Asked, Answer]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._worker: asyncio.Task[None] | None = None

    async def ask(self, asked: Asked) -> tuple[Answer, float]:
        """The answer, and the seconds that the request waited for its batch to begin.

        Raises:
            Exception: what `run` gave in place of an answer, or raised.
        """
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        waiting: _Waiting[Asked, Answer] = _Waiting(asked, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(waiting)
        return await waiting.answer

    async def _work(self) -> None:
        while True:
            batch = [await self._queue.get()]
            await asyncio.sleep(self._wait_seconds)
            while len(batch) < self._size and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            # Nobody waits any more for a request that was cancelled.
            batch = [waiting for waiting in batch if not waiting.answer.done()]
            if batch:
                await self._answer(batch)

    async def _answer(self, batch: Sequence[_Waiting[Asked, Answer]]) -> None:
        start = time.perf_counter()
        answers: Sequence[Answer | Exception]
        try:
            asked = [waiting.asked for waiting in batch]
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, asked)
        except Exception as error:
            answers = [error] * len(batch)
        for waiting, answer in zip(batch, answers, strict=True):
            if waiting.answer.done():
                continue
            if isinstance(answer, Exception):
                waiting.answer.set_exception(answer)
            else:
                waiting.answer.set_result((answer, start - waiting.since))
