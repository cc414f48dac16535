"""Leases and pages: who holds what, what gives way, and what comes back."""

import random
import sys
import threading
from collections import Counter
from itertools import pairwise

import pytest
import torch
from composition.adapters_in_memory import changes, pool_of, random_adapter, relative_error

from lorafleet.composition import BASE, METHODS, Adapter, AdapterPool, Composition, LowRank
from lorafleet.composition.groups import LayerGroup
from lorafleet.errors import AdapterError, CompositionError, UnknownAdapter

LINEAR = ["linear", "cat", "magnitude_prune", "ties", "dare_linear", "dare_ties", "fusion", "mixture"]


def filled_pool(pages, names="abcdef", rank=4, **options):
    adapters = [random_adapter(name, rank=rank, seed=number) for number, name in enumerate(names)]
    return pool_of(*adapters, pages=pages, **options)


def only(name):
    return Composition("cat", {name: 1.0})


def lease(pool, composition):
    found = pool.lease(pool.recipe(composition))
    assert found is not None
    return found


def pass_by(pool, *names):
    """Rows that come and go, one after the other."""
    for name in names:
        pool.release(lease(pool, only(name)))


def swept(pool):
    """How many pages are free once the pool has cleared away what has left it."""
    pool.release(lease(pool, BASE))
    return pool.pages.free


@pytest.fixture
def prepared(monkeypatch):
    """How often each method has prepared a layer."""
    counted = Counter()

    def counting(name, prepare):
        def prepare_and_count(*arguments):
            counted[name] += 1
            return prepare(*arguments)

        return prepare_and_count

    for name, method in METHODS.items():
        monkeypatch.setattr(method, "prepare", counting(name, method.prepare))
    return counted


def written(pool, monkeypatch):
    """The list of ranks that are written into pages from now on."""
    ranks = []
    write = pool.pages.write

    def write_and_note(pages, layers, rank):
        ranks.append(rank)
        write(pages, layers, rank)

    monkeypatch.setattr(pool.pages, "write", write_and_note)
    return ranks


def test_the_least_recently_used_gives_way(monkeypatch):
    pool = filled_pool(pages=3)
    brought_in = written(pool, monkeypatch)
    pass_by(pool, "a", "b", "c")
    assert pool.pages.free == 0
    pass_by(pool, "a", "b", "c", "a")
    assert len(brought_in) == 3, "what is at hand is not written again"
    pass_by(pool, "d")
    assert len(brought_in) == 4
    pass_by(pool, "c", "a", "d")
    assert len(brought_in) == 4, "b was the one that gave way"
    pass_by(pool, "b")
    assert len(brought_in) == 5
    pass_by(pool, "a", "d", "b")
    assert len(brought_in) == 5, "and then c"


def test_an_adapter_of_several_pages_makes_several_give_way():
    pool = filled_pool(pages=4, names="abcd")
    pool.add(random_adapter("wide", rank=11, seed=9))
    pass_by(pool, "a", "b", "c", "d")
    held = lease(pool, only("d"))
    wide = lease(pool, only("wide"))
    assert sorted([*held.pages, *wide.pages]) == [0, 1, 2, 3]
    assert pool.pages.position[wide.pages].tolist() == [0, 1, 2]


def test_there_is_no_lease_while_rows_hold_everything_and_one_after_release():
    pool = filled_pool(pages=3)
    held = [lease(pool, only(name)) for name in "abc"]
    assert pool.lease(pool.recipe(only("d"))) is None
    assert pool.lease(pool.recipe(Composition("linear", {"a": 1.0, "d": 1.0}))) is None
    again = lease(pool, Composition("linear", {"a": 0.5, "c": 0.5}))
    assert set(again.pages) <= {int(page) for one in held for page in one.pages}, "what is held is shared"
    pool.release(held[0])
    assert pool.lease(pool.recipe(only("d"))) is None, "another row holds it still"
    pool.release(again)
    lately = lease(pool, only("d"))
    assert lately.pages.tolist() == held[0].pages.tolist()
    assert len(lease(pool, BASE).pages) == 0, "the base model always fits in"


def test_a_refused_lease_takes_nothing_away(monkeypatch):
    pool = filled_pool(pages=3)
    held = [lease(pool, only(name)) for name in "ab"]
    pass_by(pool, "c")
    brought_in = written(pool, monkeypatch)
    assert pool.lease(pool.recipe(Composition("linear", {"d": 1.0, "e": 1.0}))) is None
    pass_by(pool, "c")
    assert brought_in == []
    for one in held:
        pool.release(one)
    lease(pool, Composition("linear", {"d": 1.0, "e": 1.0}))


def test_pages_that_are_held_keep_what_is_in_them():
    pool = filled_pool(pages=4)
    held = lease(pool, only("a"))
    (page,) = held.pages
    before = [(tensors.a[page].clone(), tensors.b[page].clone()) for tensors in pool.pages.tensors]
    pass_by(pool, *"bcdefbcdef")
    after = [(tensors.a[page], tensors.b[page]) for tensors in pool.pages.tensors]
    assert all(torch.equal(x, y) for old, new in zip(before, after, strict=True) for x, y in zip(old, new, strict=True))


@pytest.mark.parametrize("leave", ["removed", "replaced"])
def test_an_adapter_that_leaves_keeps_its_pages_until_the_last_row_is_done(leave):
    pool = filled_pool(pages=6, names="ab")
    first, second = lease(pool, only("a")), lease(pool, Composition("ties", {"a": 0.5, "b": 0.5}, 0.5))
    assert pool.pages.free == 3
    if leave == "removed":
        pool.remove("a")
        with pytest.raises(UnknownAdapter, match="no adapter named 'a'"):
            pool.recipe(only("a"))
    else:
        pool.add(random_adapter("a", seed=99))
        replaced = lease(pool, only("a"))
        assert not set(replaced.pages) & {*first.pages, *second.pages}
        pool.release(replaced)
        pool.remove("a")
    assert swept(pool) == 3
    pool.release(first)
    assert swept(pool) == 4
    pool.release(second)
    assert swept(pool) == 6, "ties of a and b is of no use without a"


def test_a_recipe_from_before_a_removal_still_works_and_its_pages_come_back():
    pool = filled_pool(pages=6, names="ab")
    composition = Composition("linear", {"a": 0.5, "b": -0.25})
    wanted = changes(pool, composition)
    recipe = pool.recipe(composition)
    pool.remove("a")
    pool.add(random_adapter("b", seed=99))
    assert swept(pool) == 6
    held = pool.lease(recipe)
    assert held is not None
    tensors = dict(zip(("first", "second"), pool.pages.tensors, strict=True))
    for module, change in wanted.items():
        a, b = tensors[module].a[held.pages].double(), tensors[module].b[held.pages].double()
        _, gather, spread = torch.from_numpy(held.coefficients).double()
        found = torch.einsum("nro,n->or", b, spread) @ torch.einsum("nri,n->ri", a, gather)
        assert relative_error(found, change) < 1e-5
    pool.release(held)
    assert swept(pool) == 6


def test_an_adapter_that_leaves_while_others_are_cleared_away_gives_its_pages_back_too(monkeypatch):
    pool = filled_pool(pages=4, names="ab")
    pass_by(pool, "a", "b")
    give = pool.pages.give

    def give_while_another_thread_removes(pages):
        give(pages)
        pool.remove("b")

    monkeypatch.setattr(pool.pages, "give", give_while_another_thread_removes)
    pool.remove("a")
    assert swept(pool) == 3
    assert swept(pool) == 4


def test_what_is_larger_than_the_pool_is_refused_with_the_numbers():
    pool = filled_pool(pages=2, names="ab", rank=4)
    pool.add(random_adapter("wide", rank=6))
    with pytest.raises(CompositionError, match=r"takes 12 ranks, the pool has room for 8\. Use fewer adapters, or raise"):
        pool.recipe(Composition("cat", {"a": 0.5, "wide": 0.5}))
    with pytest.raises(AdapterError, match="adapter huge has rank 9, the pool has room for 8"):
        pool.add(random_adapter("huge", rank=9))
    assert "huge" not in pool
    lease(pool, Composition("svd", {"a": 0.5, "wide": 0.5}))


def test_of_a_decomposed_sum_only_the_ranks_that_are_used_are_kept(monkeypatch):
    pool = filled_pool(pages=50)
    write, found = pool.pages.write, {}

    def write_and_note(pages, layers, rank):
        found.update(layers)
        write(pages, layers, rank)

    monkeypatch.setattr(pool.pages, "write", write_and_note)
    lease(pool, Composition("svd", dict.fromkeys("abcdef", 0.5)))
    plain = pool["a"].layers
    assert found.keys() == plain.keys()
    for module, layer in found.items():
        for half, as_loaded in ((layer.a, plain[module].a), (layer.b, plain[module].b)):
            assert (half.shape, half.untyped_storage().nbytes()) == (as_loaded.shape, as_loaded.nbytes)


def test_every_weight_has_its_coefficients():
    """PEFT leaves out the adapters that a short list of weights has no weight for; here a weight belongs to a name."""
    pool = filled_pool(pages=8)
    for count in range(1, 7):
        weights = {name: 0.25 * number + 0.25 for number, name in enumerate("abcdef"[:count])}
        held = lease(pool, Composition("cat", weights))
        assert held.coefficients[0].tolist() == list(weights.values())
        assert len(set(held.pages)) == count
        pool.release(held)


def random_composition(draws, names):
    chosen = draws.sample(names, draws.randint(1, 4))
    return Composition(
        draws.choice(list(METHODS)),
        {name: draws.uniform(-1, 1) for name in chosen},
        draws.choice([0.3, 0.7]),
        draws.choice(["frequency", "total"]),
    )


def test_however_many_compositions_pass_the_pages_are_all_there_is(prepared):
    pool = filled_pool(pages=10)
    draws = random.Random(4)
    rows, refused = [], 0
    for _ in range(200):
        held = pool.lease(pool.recipe(random_composition(draws, "abcdef")))
        if held is None:
            refused += 1
        else:
            rows.append(held)
            in_use = {int(page) for row in rows for page in row.pages}
            assert len(in_use) <= pool.pages.count - pool.pages.free <= pool.pages.count
        if held is None or draws.random() < 0.5:
            pool.release(rows.pop(draws.randrange(len(rows))))
    assert refused > 10, "the pool was full at times"
    assert prepared["svd"] > 5
    assert all(tensors.a.shape[0] == 10 for tensors in pool.pages.tensors)
    for row in rows:
        pool.release(row)
    for name in "abcdef":
        pool.remove(name)
    assert swept(pool) == 10, "no page is lost"


@pytest.mark.parametrize("method", LINEAR)
def test_distinct_weights_take_no_more_pages_and_no_more_preparing(method, prepared, monkeypatch):
    pool = filled_pool(pages=50)
    brought_in = written(pool, monkeypatch)
    draws = random.Random(5)
    weights = [{name: draws.uniform(-1, 1) for name in "abc"} for _ in range(200)]
    held = [lease(pool, Composition(method, one, 0.5)) for one in weights]
    assert pool.pages.free == 47
    assert len(brought_in) == 3
    assert prepared[method] in (0, 2, 6), "nothing; each layer once for the set; or once for each adapter"
    pages = {tuple(one.pages) for one in held}
    assert len(pages) == 1
    if method not in ("fusion", "mixture"):
        assert len({one.coefficients.tobytes() for one in held}) == 200


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_an_election_is_held_once_for_a_set_of_adapters(method, prepared):
    pool = filled_pool(pages=50)
    layers = 2

    def vote(names, density=0.5, majority_sign="frequency"):
        weights = {name: 0.1 + number for number, name in enumerate(names)}
        pool.release(lease(pool, Composition(method, weights, density, majority_sign)))
        return prepared[method]

    assert vote("abc") == layers
    assert vote("cab") == layers
    assert vote("bca") == layers
    assert vote("ab") == 2 * layers, "another set"
    assert vote("abc", density=0.3) == 3 * layers
    assert vote("abc", majority_sign="total") == 4 * layers
    assert vote("abc") == 4 * layers
    pool.add(random_adapter("c", seed=99))
    assert vote("abc") == 5 * layers, "another c"


def test_a_set_of_which_one_member_gave_way_is_made_whole_again():
    pool = filled_pool(pages=4)
    ties = Composition("ties", {"a": 0.5, "b": 0.3, "c": 0.2}, 0.5)
    wanted = changes(pool, ties)
    pass_by(pool, "d", "e")
    assert pool.pages.free == 0
    found = changes(pool, ties)
    assert all(relative_error(found[module], change) < 1e-6 for module, change in wanted.items())


def test_adapters_come_and_go_in_other_threads():
    """Every lease must hold the adapter that its recipe found, and no page may be lost.

    An adapter is one number here: the product of its A and its B.
    """
    pool = AdapterPool([LayerGroup(("layer",), 1, (1,))], torch.device("cpu"), torch.float32, pages=6, page_rank=1)

    def adapter(name, value):
        return Adapter(name, {"layer": LowRank(torch.tensor([[float(value)]]), torch.tensor([[1.0]]), 1.0)})

    names, stop, errors = "abcd", threading.Event(), []

    def come_and_go(offset):
        draws = random.Random(offset)
        value = offset
        try:
            while not stop.is_set():
                name = draws.choice(names)
                if draws.random() < 0.3:
                    pool.remove(name)
                else:
                    value += 10
                    pool.add(adapter(name, value))
                assert set(pool) <= set(names)
                try:
                    assert pool[name].name == name
                    pool.recipe(Composition("linear", dict.fromkeys(draws.sample(names, 2), 0.5)))
                except UnknownAdapter:
                    continue
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=come_and_go, args=(offset,)) for offset in (1, 2)]
    for thread in threads:
        thread.start()
    draws, rows, leased = random.Random(0), [], 0
    try:
        while leased < 500:
            try:
                recipe = pool.recipe(Composition("cat", dict.fromkeys(draws.sample(names, draws.randint(1, 3)), 1.0)))
            except UnknownAdapter:
                continue
            held = pool.lease(recipe)
            if held is not None:
                leased += 1
                rows.append((recipe, held))
            while rows and (held is None or len(rows) > 3):
                recipe, held = rows.pop(draws.randrange(len(rows)))
                values = [kept.adapter.layers["layer"].a.item() for part in recipe.parts for kept in part.sources.values()]
                assert pool.pages.tensors[0].a[held.pages].flatten().tolist() == values
                pool.release(held)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert errors == []
    for _, held in rows:
        pool.release(held)
    for name in names:
        pool.remove(name)
    assert swept(pool) == 6


@pytest.mark.parametrize("method", ["linear", "cat", "ties"])
def test_a_page_that_is_written_again_holds_nothing_of_what_lay_in_it(method):
    """Also where the new adapter has fewer ranks, or leaves a layer alone that the old one changed."""
    wide = [random_adapter(name, rank=12, seed=number) for number, name in enumerate("uv")]
    whole, other = (random_adapter(name, rank=4, seed=number) for number, name in enumerate("xy"))
    partial = Adapter("y", {"second": other.layers["second"]})
    composition = Composition(method, {"x": 0.6, "y": -0.9}, 0.5)
    wanted = changes(pool_of(whole, partial, pages=2, page_rank=16), composition)
    pool = pool_of(*wide, whole, partial, pages=2, page_rank=16)
    pass_by(pool, "u", "v")
    found = changes(pool, composition)
    assert all(torch.equal(found[module], change) for module, change in wanted.items())


def test_an_adapter_that_finds_no_memory_leaves_the_one_of_its_name_in_place(monkeypatch):
    groups = [LayerGroup(("first",), 12, (10,)), LayerGroup(("second",), 10, (12,))]
    pool = AdapterPool(groups, torch.device("cpu"), torch.float32, pages=4, page_rank=4)
    before = Adapter("a", {"first": random_adapter("a").layers["first"]})
    pool.add(before)

    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(pool.pages, "_made", no_memory)
    with pytest.raises(MemoryError):
        pool.add(random_adapter("a", seed=9))
    assert pool["a"] is before


def test_pages_of_one_adapter_are_in_order_and_padded_with_zeros():
    pool = pool_of(random_adapter("wide", rank=10), page_rank=4, pages=5)
    held = lease(pool, only("wide"))
    assert all(before < after for before, after in pairwise(held.pages))
    for tensors in pool.pages.tensors:
        last = held.pages[-1]
        assert tensors.b[last, :2].any()
        assert not tensors.b[last, 2:].any()
        assert not tensors.a[last, 2:].any()
