"""The weighers that look at where a query lies: a case by hand, and what must hold for any query."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx
from scipy.optimize import minimize

from lorafleet.weighing import (
    BY_PLACE,
    MOST_PROTOTYPES,
    Abstaining,
    Evidence,
    Joint,
    NearestPrototypes,
    Prototypes,
    Routed,
    Router,
    SparseProjection,
    learn_places,
    make_weigher,
    projection,
    read_places,
    train_router,
    write_places,
)
from lorafleet.weighing.row_sample import RowSample


@dataclass(frozen=True)
class Neighbour:
    task: str
    similarity: float


PROTOTYPES = Prototypes.of({"north": [0, 0.5], "east": [1, 0], "west": [-1, 0]})
EAST_BY_NORTH = np.array([0.8, 0.6], np.float32)
DRAWS = st.integers(0, 2**32 - 1)


def evidence(embedding, router=None):
    return Evidence([], np.asarray(embedding, np.float32), PROTOTYPES, router)


@pytest.mark.parametrize(
    ("weigher", "weights"),
    [
        (NearestPrototypes(0.2, 1), {"east": 1.0}),
        (NearestPrototypes(0.2, 2), {"east": math.e / (math.e + 1), "north": 1 / (math.e + 1)}),
        (NearestPrototypes(1e9, 3), {"east": 1 / 3, "north": 1 / 3, "west": 1 / 3}),
        # (0.8 - e)^2 + (0.6 - n / 2)^2 is least for e + n = 1 at n = 0.4.
        (SparseProjection(0.0, 2), {"east": 0.6, "north": 0.4}),
        (SparseProjection(1.0, 1), {"east": 1.0}),
    ],
)
def test_a_case_by_hand(weigher, weights):
    found = weigher.weigh(evidence(EAST_BY_NORTH))
    assert dict(found) == approx(weights, abs=1e-6)
    assert next(iter(found)) == "east"


def test_the_router_and_the_neighbours_together():
    router = Router(("east", "north", "west"), np.zeros((3, 2), np.float32), np.log([0.5, 0.3, 0.2]).astype(np.float32))
    near = [Neighbour("north", 0.9), Neighbour("west", 0.1)]
    known = Evidence(near, EAST_BY_NORTH, PROTOTYPES, router)
    # Of shares that sum to 1: 0.5 x 0.005, 0.3 x (0.9 + 0.005), 0.2 x (0.1 + 0.005)
    assert dict(Joint(3).weigh(known)) == approx({"north": 0.2715 / 0.295, "west": 0.021 / 0.295, "east": 0.0025 / 0.295})
    assert dict(Joint(2).weigh(known)) == approx({"north": 0.2715 / 0.2925, "west": 0.021 / 0.2925})
    assert dict(Joint(2).weigh(known, among={"east", "west"})) == approx({"west": 0.201 / 0.2035, "east": 0.0025 / 0.2035})
    assert Joint(2).weigh(known, among={"elsewhere"}) == {}
    assert dict(Joint(1).weigh(near)) == {"north": 1.0}, "where none has learned yet"
    come = Evidence([Neighbour("new", 0.6), Neighbour("north", 0.4)], EAST_BY_NORTH, PROTOTYPES, router)
    # 0.6 x (0.6 + 0.005), and of the 0.4 that are left 0.3 x (0.4 + 0.005)
    assert dict(Joint(2).weigh(come)) == approx({"new": 0.363 / 0.4116, "north": 0.0486 / 0.4116}), "a task since it learned"
    alone = Evidence([Neighbour("new", 1.0)], EAST_BY_NORTH, PROTOTYPES, router)
    assert dict(Joint(3).weigh(alone)) == {"new": 1.0}
    sharp = make_weigher("joint", {"k": 1, "sharpness": 8})
    assert dict(sharp.weigh(known)) == {"north": 1.0} and sharp.weigh(known).shares["north"] > 0.99


def test_only_tasks_with_an_adapter_count():
    for weigher in (NearestPrototypes(k=1), SparseProjection(k=1), SparseProjection(k=9)):
        assert dict(weigher.weigh(evidence(EAST_BY_NORTH), among={"north"})) == approx({"north": 1.0})
        assert weigher.weigh(evidence(EAST_BY_NORTH), among={"elsewhere"}) == {}
        assert weigher.weigh(Evidence([])) == {}


@settings(deadline=None)
@given(DRAWS, st.floats(0, 3), st.integers(1, 9))
def test_projected_weights_sum_to_one_and_lie_on_the_nearest(seed, penalty, count):
    draws = np.random.default_rng(seed)
    prototypes = Prototypes.of({str(task): draws.standard_normal(5) for task in range(6)})
    query = draws.standard_normal(5).astype(np.float32)
    weights = SparseProjection(penalty, count).weigh(Evidence([], query, prototypes))
    assert sum(weights.values()) == approx(1, abs=1e-5)
    assert set(weights) <= {near.task for near in prototypes.nearest(query, count)}
    assert [abs(weight) for weight in weights.values()] == sorted(map(abs, weights.values()), reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 100.0])
def test_a_projection_onto_a_thousand_prototypes_is_one_onto_a_few(monkeypatch, penalty):
    solved = []

    def counted(loss, start, **options):
        found = minimize(loss, start, **options)
        solved.append((len(start), found.nfev, found.nit))
        return found

    monkeypatch.setattr(projection, "minimize", counted)
    draws = np.random.default_rng(7)
    prototypes = Prototypes.of({str(task): draws.standard_normal(64) for task in range(1000)})
    weights = SparseProjection(penalty, 1000).weigh(Evidence([], draws.standard_normal(64).astype(np.float32), prototypes))
    ((unknowns, evaluations, steps),) = solved
    assert unknowns == 2 * MOST_PROTOTYPES and steps <= projection.STEPS and evaluations <= 10 * projection.STEPS
    assert 0 < len(weights) <= MOST_PROTOTYPES and sum(weights.values()) == approx(1, abs=1e-5)


@pytest.mark.parametrize("tasks", [2, 4])
def test_a_router_learns_what_can_be_told_apart(tasks):
    draws = np.random.default_rng(0)
    centres = draws.standard_normal((tasks, 8)) * 3
    rows = np.repeat(np.arange(tasks), 40)
    embeddings = (centres[rows] + draws.standard_normal((len(rows), 8)) * 0.3).astype(np.float32)
    names = [f"task {row}" for row in rows]
    router = train_router(embeddings, names)
    for task, centre in enumerate(centres):
        likely = router.probabilities(centre)
        assert next(iter(likely)) == f"task {task}"
        assert sum(likely.values()) == approx(1)
        assert dict(Routed(1).weigh(evidence(centre, router))) == {f"task {task}": 1.0}
        assert dict(Routed(99).weigh(evidence(centre, router))) == approx(likely)


def test_places_are_learned_from_rows_and_kept(tmp_path):
    draws = np.random.default_rng(0)
    centres = {"north": [0.0, 1.0, 0.0], "east": [1.0, 0.0, 0.0], "up": [0.0, 0.0, 1.0]}
    names = [name for name in centres for _ in range(30)]
    vectors = (np.array([centres[name] for name in names]) + draws.normal(0, 0.1, (90, 3))).astype(np.float32)
    order = draws.permutation(90)
    places = learn_places((([names[row] for row in part], vectors[part]) for part in np.split(order, 3)), "first")
    assert dict(zip(places.prototypes.tasks, places.prototypes.vectors.tolist(), strict=True)) == {
        name: approx(vectors[[other == name for other in names]].mean(axis=0).tolist(), abs=1e-5) for name in centres
    }
    path = tmp_path / "kept" / "places.npz"
    write_places(path, places)
    kept = read_places(path, "first")
    assert kept is not None and kept.index == "first" and [file.name for file in path.parent.iterdir()] == ["places.npz"]
    for name in BY_PLACE:
        for query in draws.standard_normal((5, 3)):
            weights = make_weigher(name, {}).weigh(kept.evidence([], query))
            assert weights and weights == make_weigher(name, {}).weigh(places.evidence([], query))
    assert read_places(path, "second") is None and read_places(tmp_path / "nowhere", "first") is None
    path.write_bytes(path.read_bytes()[:200])
    assert read_places(path, "first") is None
    alone = learn_places([(["north"] * 30, vectors[:30])])
    assert alone.router is None and not learn_places([]).prototypes.tasks


def test_of_many_rows_the_router_learns_from_as_many_of_each_task_each_as_likely_as_the_others():
    draws = np.random.default_rng(0)
    names = [*["many"] * 900, *["few"] * 100, *["one"]]
    vectors = draws.standard_normal((len(names), 4)).astype(np.float32)
    numbers = np.arange(len(names), dtype=np.float32)[:, None]
    seen = np.zeros(len(names))
    for seed in range(200):
        sample = RowSample(60, seed)
        for part in np.split(draws.permutation(len(names)), 11):
            sample.add([names[row] for row in part], numbers[part])
        kept, tasks = sample.rows()
        assert [names[int(row)] for row in kept[:, 0]] == tasks
        assert {task: tasks.count(task) for task in tasks} == {"many": 20, "few": 20, "one": 1}
        seen[kept[:, 0].astype(int)] += 1
    # 200 draws of 20 of 900, and of 100: no row is left out for when it came.
    assert seen[:900].max() < 20 and seen[900:1000].min() > 20 and seen[900:1000].max() < 70
    whole, tasks = sample.rows()
    assert len(whole) == len(tasks) == 41
    bounded = learn_places([(names, vectors)], most=60)
    every = learn_places([(names, vectors)])
    np.testing.assert_array_equal(bounded.prototypes.vectors, every.prototypes.vectors)
    assert bounded.router is not None and every.router is not None
    assert bounded.router.tasks == every.router.tasks
    assert not np.array_equal(bounded.router.weights, every.router.weights)


def test_who_abstains_passes_on_all_that_is_known():
    near = Evidence([Neighbour("north", 0.5)], EAST_BY_NORTH, PROTOTYPES)
    assert dict(Abstaining(NearestPrototypes(0.2, 1), 0.5).weigh(near)) == {"east": 1.0}
    assert not Abstaining(NearestPrototypes(0.2, 1), 0.6).weigh(near)
