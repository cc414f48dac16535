"""The kernels, on a table made of the runs of a pass, add what the plain products add."""

import random

import pytest
import torch
from interpreted import DEVICE

pytest.importorskip("triton", reason="triton is not installed")

from lorafleet.composition import Adapter, AdapterPool, Composition, LowRank, Run, kernels, products
from lorafleet.composition.groups import LayerGroup
from lorafleet.composition.plan import make_plan
from lorafleet.composition.tables import block_for, contents, empty_table, fill, make_table

GROUPS = [LayerGroup(("q", "k", "v"), 64, (64, 32, 32)), LayerGroup(("down",), 96, (64,))]


def adapter(name: str, rank: int, seed: int, modules: tuple[str, ...] = ("q", "k", "v", "down")) -> Adapter:
    draws = torch.Generator().manual_seed(seed)
    shapes = {
        module: (outputs, group.inputs)
        for group in GROUPS
        for module, outputs in zip(group.modules, group.outputs, strict=True)
    }
    return Adapter(
        name,
        {
            module: LowRank(
                torch.randn(rank, shapes[module][1], generator=draws),
                torch.randn(shapes[module][0], rank, generator=draws),
                0.5,
            )
            for module in modules
        },
    )


@pytest.fixture
def pool() -> AdapterPool:
    pool = AdapterPool(GROUPS, DEVICE, torch.float32, pages=24, page_rank=16)
    for number in range(4):
        pool.add(adapter(f"wide{number}", 40, number))
    pool.add(adapter("thin", 8, 9, modules=("q", "down")))
    return pool


def leases(pool: AdapterPool, count: int) -> list:
    draws = random.Random(3)
    wide = [f"wide{number}" for number in range(4)]
    found = []
    for number in range(count):
        weights = {name: draws.uniform(-1, 1) for name in draws.sample(wide, 1 + number % 3)}
        method = ("linear", "cat")[number % 2]
        if method == "cat":
            weights["thin"] = 0.7
        lease = pool.lease(pool.recipe(Composition(method, weights)))
        assert lease is not None
        found.append(None if number % 5 == 4 else lease)
    return found


@pytest.mark.parametrize("tokens", [[1] * 11, [1, 9, 1, 1, 40, 3], [70, 1, 33]])
def test_kernels_add_what_the_plain_products_add(pool, tokens):
    runs = [Run(lease, count) for lease, count in zip(leases(pool, len(tokens)), tokens, strict=True)]
    table = make_table(runs, pool.pages, block_for(sum(tokens)))
    check(pool, runs, table, sum(tokens))


def test_a_table_is_filled_again_with_fewer_rows(pool):
    """As a captured step is: what the table held before is not read."""
    rows = leases(pool, 20)
    table = empty_table(16, 2, 40, pool.pages.positions, DEVICE)
    for count in (20, 3, 17):
        runs = [Run(lease, 1) for lease in rows[:count]]
        fill(table, contents(runs, pool.pages, table.positions, 16, blocks=2))
        check(pool, runs, table, count)


def test_a_table_is_filled_after_a_wider_adapter_has_come():
    """Another thread adds it while a pass that knows nothing of it is made ready."""
    pool = AdapterPool(GROUPS, DEVICE, torch.float32, pages=24, page_rank=16)
    pool.add(adapter("thin", 8, 9))
    table = empty_table(16, 1, 24, pool.pages.positions, DEVICE)
    pool.add(adapter("wide", 40, 0))
    assert (table.positions, pool.pages.positions) == (1, 3)
    lease = pool.lease(pool.recipe(Composition("cat", {"thin": 0.7})))
    runs = [Run(lease, 1)] * 5
    fill(table, contents(runs, pool.pages, table.positions, 16))
    check(pool, runs, table, 5)


def check(pool, runs, table, tokens):
    plan = make_plan(runs, pool.pages)
    for number, group in enumerate(GROUPS):
        tensors = pool.pages.tensors[number]
        x = torch.randn(tokens, group.inputs, generator=torch.Generator().manual_seed(number)).to(DEVICE)
        y = torch.randn(tokens, group.starts[-1]).to(DEVICE)
        plain, kernel = y.clone(), y.clone()
        products.add_composed_(plain, x, group, tensors, plan)
        kernels.add_composed_(kernel, x, tensors.a, tensors.b, table, group.outputs)
        assert (plain - y).norm() > 0.1 * y.norm()
        torch.testing.assert_close(kernel, plain, rtol=1e-3, atol=1e-3)
