"""Places in a replica, without the replica: who waits for them, and how they follow the index."""

import asyncio

import pytest

import serve.placing
from lorafleet.errors import IndexUnavailable
from lorafleet.weighing import Places, Prototypes
from serve.placing import Placing


def places(index: str) -> Places:
    return Places(Prototypes.of({}), index=index)


def test_all_who_wait_share_one_learning_and_who_hangs_up_does_not_end_it():
    begun: list[Places | None] = []

    async def ask() -> None:
        may_end = asyncio.Event()

        async def learn(last: Places | None) -> Places:
            begun.append(last)
            await may_end.wait()
            return places("first")

        placing = Placing(learn)
        first, second = asyncio.create_task(placing.places()), asyncio.create_task(placing.places())
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        may_end.set()
        assert (await second).index == (await placing.places()).index == "first"

    asyncio.run(ask())
    assert begun == [None]


def test_they_follow_the_index_and_stay_while_it_is_away(monkeypatch):
    monkeypatch.setattr(serve.placing, "LOOK_SECONDS", 0.001)
    away = IndexUnavailable("no Chroma server answers")
    answers = [away, places("first"), away, ValueError("one class"), places("second")]

    async def learn(last: Places | None) -> Places:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def ask() -> None:
        placing = Placing(learn)
        with pytest.raises(IndexUnavailable):
            await placing.places()
        found = [(await placing.places()).index]
        while found[-1] != "second":
            await asyncio.sleep(0.001)
            found.append((await placing.places()).index)
        assert set(found) == {"first", "second"}

    asyncio.run(asyncio.wait_for(ask(), 20))
