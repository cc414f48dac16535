"""Forms that a method prepares: by a thread of their own, within their share of the pages, given up with their row."""

import threading
from concurrent.futures import CancelledError

import pytest
import torch
from composition.adapters_in_memory import changes, pool_of, random_adapter, relative_error

from lorafleet.composition import METHODS, Composition

PATIENCE = 60


def pruned(names, density=0.5):
    return Composition("magnitude_prune", dict.fromkeys(names, 0.5), density)


@pytest.fixture
def gate(monkeypatch):
    """`magnitude_prune` prepares only while the gate is open; how many layers it has begun is counted."""

    class Gate(threading.Event):
        begun = 0

    opened = Gate()
    prepare = METHODS["magnitude_prune"].prepare

    def wait_and_prepare(*arguments):
        opened.begun += 1
        assert opened.wait(PATIENCE)
        return prepare(*arguments)

    monkeypatch.setattr(METHODS["magnitude_prune"], "prepare", wait_and_prepare)
    yield opened
    opened.set()


def small_pool(pages, prepared_share, names="abcdef"):
    adapters = [random_adapter(name, seed=number) for number, name in enumerate(names)]
    return pool_of(*adapters, pages=pages, prepared_share=prepared_share)


def lease(pool, composition, wait=True):
    found = pool.lease(pool.recipe(composition), wait)
    assert found is not None
    return found


def test_densities_are_hundredths():
    assert [pruned("ab", density).density for density in (0.5, 0.501, 0.499999, 1e-9, 0.0149, 1.0)] == [
        *(0.5, 0.5, 0.5, 0.01, 0.01, 1.0)
    ]


def test_prepared_forms_never_push_out_more_than_their_share():
    pool = small_pool(pages=9, prepared_share=1 / 3)
    plain = [pool.recipe(Composition("cat", {name: 1.0})) for name in "abcdef"]
    for recipe in plain:
        pool.release(pool.lease(recipe))
    at_hand = {key: resident for key, resident in pool._resident.items() if resident.plain}
    for density in range(1, 100):
        pool.release(lease(pool, pruned("ab", density / 100)))
        assert sum(len(one.pages) for one in pool._resident.values() if not one.plain) <= 3
    assert {key: resident for key, resident in pool._resident.items() if resident.plain} == at_hand
    assert len(at_hand) == 6


def test_forms_beyond_their_share_wait_for_others_and_one_composition_always_fits():
    pool = small_pool(pages=12, prepared_share=1 / 4)
    held = [lease(pool, pruned("ab"))]
    other = pool.recipe(pruned("cd"))
    assert pool.prepares_too_much(other)
    assert pool.lease(other) is None, "two and two are more than three"
    assert pool.lease(pool.recipe(Composition("cat", dict.fromkeys("abcdef", 1.0)))), "there is room for plain adapters"
    held.append(lease(pool, pruned("ab")))
    for one in held:
        pool.release(one)
    assert len(lease(pool, pruned("abcdef", 0.7)).pages) == 6, "alone it may have more than the share"


def test_a_lease_is_ready_once_its_forms_are_written_and_sharers_wait_for_one_preparation(gate):
    pool = small_pool(pages=12, prepared_share=1)
    first, second = (lease(pool, pruned("ab"), wait=False) for _ in range(2))
    assert not first.ready and not second.ready
    assert first.waits_for == second.waits_for
    assert lease(pool, Composition("linear", {"c": 1.0, "d": 1.0})).ready, "the pool goes on meanwhile"
    gate.set()
    second.check()
    assert first.ready and second.ready and not first.waits_for
    assert gate.begun == 4, "two layers of two adapters, each once"
    for one in (first, second):
        pool.release(one)
    wanted = changes(small_pool(pages=12, prepared_share=1), pruned("ab"))
    found = changes(pool, pruned("ab"))
    assert all(relative_error(found[module], change) < 1e-6 for module, change in wanted.items())


def test_what_nobody_waits_for_any_more_is_given_up_and_its_pages_come_back(gate):
    pool = small_pool(pages=12, prepared_share=1)
    doomed = lease(pool, pruned("abcdef"), wait=False)
    preparations = doomed.waits_for
    pool.release(doomed)
    again = lease(pool, pruned("ab"), wait=False)
    gate.set()
    again.check()
    given_up = [one for one in preparations if isinstance(one.exception(PATIENCE), CancelledError)]
    assert len(given_up) == 6, "of the first adapter one layer was begun already, of the others none"
    assert gate.begun == 1 + 4
    pool.release(again)
    pool.release(lease(pool, Composition()))
    assert pool.pages.free == 10


def test_a_preparation_that_fails_fails_its_rows_and_is_tried_again(monkeypatch):
    pool = small_pool(pages=12, prepared_share=1)
    prepare = METHODS["ties"].prepare

    def no_memory(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(METHODS["ties"], "prepare", no_memory)
    ties = Composition("ties", {"a": 0.5, "b": 0.5}, 0.5)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            pool.lease(pool.recipe(ties))
    monkeypatch.setattr(METHODS["ties"], "prepare", prepare)
    pool.release(lease(pool, ties))
    assert pool.pages.free == 10
