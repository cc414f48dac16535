"""The plain products against the formula in float64: any runs, any pages, whatever their order."""

import pytest
import torch
from composition.adapters_in_memory import relative_error
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lorafleet.composition import Run
from lorafleet.composition.groups import LayerGroup
from lorafleet.composition.pages import Pages, PageTensors
from lorafleet.composition.plan import TOKENS_ALONE, WASTE, Block, Plan, make_plan
from lorafleet.composition.pool import Lease
from lorafleet.composition.products import add_composed_

CPU = torch.device("cpu")


def normal(*shape, draws, scale=1.0):
    return torch.randn(shape, generator=draws) * scale


def lease_of(pages, coefficients):
    return Lease((), torch.tensor(pages, dtype=torch.int64).numpy(), coefficients.numpy())


def added_in_float64(x, group, tensors, taken, position, rank):
    """What every token adds: sum_j B_j (direct_j A_j x + spread_j sum_i gather_i A_i x), the sum over pages of one position.

    Args:
        taken: of each token, (page, direct, gather, spread) of every page.
    """
    added = torch.zeros(len(x), group.starts[-1], dtype=torch.float64)
    for token, shares in enumerate(taken):
        for place in range(len(group.modules)):
            columns = slice(group.starts[place], group.starts[place + 1])
            down = {
                page: tensors.a[page, place * rank : (place + 1) * rank].double() @ x[token].double() for page, *_ in shares
            }
            for page, direct, _, spread in shares:
                z = direct * down[page]
                for other, _, gather, _ in shares:
                    if position[other] == position[page]:
                        z = z + spread * gather * down[other]
                added[token, columns] += z @ tensors.b[page, :, columns].double()
    return added


@st.composite
def owners(draw, count):
    """The adapters that lie in the pages: of each, its pages in order, anywhere among all."""
    order = draw(st.permutations(range(count)))
    found, start = [], 0
    while start < count:
        size = draw(st.integers(1, 3))
        found.append(order[start : start + size])
        start += size
    return found


@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_every_token_adds_what_the_formula_says(data):
    count, rank = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 6))
    outputs = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    group = LayerGroup(tuple(f"layer{number}" for number in range(len(outputs))), data.draw(st.integers(1, 24)), outputs)
    pages = Pages([group], count, rank, CPU, torch.float32)
    adapters = data.draw(owners(count))
    for own in adapters:
        pages.position[own] = range(len(own))
    draws = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    tensors = PageTensors(
        normal(count, len(outputs) * rank, group.inputs, draws=draws), normal(count, rank, group.starts[-1], draws=draws)
    )
    runs, taken = [], []
    lengths = st.sampled_from([1, 2, 7, TOKENS_ALONE - 1, TOKENS_ALONE, 45])
    for tokens in data.draw(st.lists(lengths, min_size=1, max_size=6)):
        chosen = data.draw(st.lists(st.sampled_from(range(len(adapters))), max_size=4, unique=True))
        kinds = [data.draw(st.sampled_from([(1, 0, 0), (0, 1, 1), (1, 1, 1)])) for _ in chosen]
        numbers, columns = [], []
        for adapter, kind in zip(chosen, kinds, strict=True):
            coefficients = normal(3, draws=draws) * torch.tensor(kind)
            numbers += adapters[adapter]
            columns += [coefficients] * len(adapters[adapter])
        table = torch.stack(columns, dim=1) if columns else torch.zeros(3, 0)
        base = not chosen and data.draw(st.booleans())
        runs.append(Run(None if base else lease_of(numbers, table), tokens))
        shares = [(page, *column.double().tolist()) for page, column in zip(numbers, table.T, strict=True)]
        taken += [shares] * tokens
    x, y = normal(len(taken), group.inputs, draws=draws), normal(len(taken), group.starts[-1], draws=draws)
    plan = make_plan(runs, pages)
    assert plan.tokens == len(taken)
    before = y.clone()
    add_composed_(y, x, group, tensors, plan)
    wanted = before + added_in_float64(x, group, tensors, taken, pages.position, rank)
    assert relative_error(y, wanted) < 1e-5
    untouched = [token for token, shares in enumerate(taken) if not shares]
    assert torch.equal(y[untouched], before[untouched]), "the base model's tokens stay as they are"


PAGES = 24


@pytest.fixture
def lone_group():
    return LayerGroup(("q", "k"), 11, (6, 4))


@pytest.fixture
def filled(lone_group):
    draws = torch.Generator().manual_seed(5)
    return PageTensors(
        normal(PAGES, 2 * 3, lone_group.inputs, draws=draws), normal(PAGES, 3, lone_group.starts[-1], draws=draws)
    )


@pytest.mark.parametrize("pages", [slice(2, 6), torch.tensor([2, 3, 4, 5]), torch.tensor([23, 0, 7, 11])], ids=str)
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "no direct"])
@pytest.mark.parametrize("gathered", [True, False], ids=["gathered", "not gathered"])
@pytest.mark.parametrize("places", [None, [0, 1, 0, 1]], ids=["one page each", "two pages each"])
def test_a_block_made_by_hand(lone_group, filled, pages, direct, gathered, places):
    draws = torch.Generator().manual_seed(7)
    tokens, numbers = slice(3, 8), list(range(2, 6)) if isinstance(pages, slice) else pages.tolist()
    tables = [normal(4, 5, draws=draws) if given else None for given in (direct, gathered, gathered)]
    one_hot = None if places is None else torch.eye(2)[places]
    plan = Plan(10, (Block(tokens, pages, *tables, None, one_hot),))
    x, y = normal(10, lone_group.inputs, draws=draws), normal(10, lone_group.starts[-1], draws=draws)
    position = dict(zip(numbers, places or [0] * 4, strict=True))
    filled_in = torch.stack([torch.zeros(4, 5) if table is None else table for table in tables], dim=2).transpose(0, 1)
    taken = [[(page, *given) for page, given in zip(numbers, row, strict=True)] for row in filled_in.tolist()]
    wanted = y.double()
    wanted[tokens] += added_in_float64(x[tokens], lone_group, filled, taken, position, rank=3)
    before = y.clone()
    add_composed_(y, x, lone_group, filled, plan)
    assert relative_error(y, wanted) < 1e-5
    assert torch.equal(y[:3], before[:3])
    assert torch.equal(y[8:], before[8:])


def test_neighbouring_pages_are_read_where_they_lie_and_scattered_ones_are_gathered(lone_group, filled):
    pages = Pages([lone_group], PAGES, 3, CPU, torch.float32)
    draws = torch.Generator().manual_seed(9)
    coefficients = normal(3, 2, draws=draws)
    near, far = lease_of([4, 4 + 2 * WASTE - 1], coefficients), lease_of([4, 4 + 2 * WASTE], coefficients)
    (hull,), (scattered,) = (make_plan([Run(lease, 2)], pages).blocks for lease in (near, far))
    assert hull.pages == slice(4, 4 + 2 * WASTE)
    assert isinstance(scattered.pages, torch.Tensor)
    assert scattered.pages.tolist() == [4, 4 + 2 * WASTE]
    x = normal(2, lone_group.inputs, draws=draws)
    for lease in (near, far):
        y = torch.zeros(2, lone_group.starts[-1])
        add_composed_(y, x, lone_group, filled, make_plan([Run(lease, 2)], pages))
        shares = [(int(page), *column) for page, column in zip(lease.pages, lease.coefficients.T.tolist(), strict=True)]
        wanted = added_in_float64(x, lone_group, filled, [shares] * 2, pages.position, rank=3)
        assert relative_error(y, wanted) < 1e-5


def test_a_long_run_is_a_block_by_itself(lone_group):
    pages = Pages([lone_group], PAGES, 3, CPU, torch.float32)
    one = torch.ones(3, 1)
    runs = [
        Run(lease_of([0], one), 3),
        Run(None, 2),
        Run(lease_of([1], one), TOKENS_ALONE),
        Run(None, TOKENS_ALONE + 4),
        Run(lease_of([2], one), 1),
    ]
    plan = make_plan(runs, pages)
    long = 5 + TOKENS_ALONE
    assert [block.tokens for block in plan.blocks] == [
        slice(0, 5),
        slice(5, long),
        slice(long + TOKENS_ALONE + 4, long + TOKENS_ALONE + 5),
    ]
    assert [block.pages for block in plan.blocks] == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert plan.tokens == long + TOKENS_ALONE + 5
