"""The composition kernels against the formulas in float64: on a GPU where there is one, else in Triton's interpreter."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from interpreted import DEVICE

pytest.importorskip("triton", reason="triton is not installed")

from lorafleet.composition.blocks import BlockTable
from lorafleet.composition.kernels import add_composed_
from lorafleet.errors import AdapterError

# The interpreter cannot multiply in bfloat16.
SHORT = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16


@dataclass(frozen=True)
class Share:
    """What a token takes of one adapter."""

    pages: tuple[int, ...]
    direct: float
    gather: float
    spread: float


@dataclass(frozen=True)
class Case:
    """A batch: every token's shares, and the tensors that the kernels read."""

    shares: list[list[Share]]
    x: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    y: torch.Tensor
    outputs: tuple[int, ...]

    @property
    def rank(self) -> int:
        return self.b.shape[1]


def block_table(shares, block, positions, starts=(0,), capacity=0):
    """The table of a batch whose prompts begin at `starts`; what lies behind its last entry is rubbish."""
    ends = (*starts[1:], len(shares))
    bounds = [first for start, end in zip(starts, ends, strict=True) for first in range(start, end, block)] + [len(shares)]
    pages, entry_starts, sums, columns = [], [0], [], []
    for first, last in pairwise(bounds):
        rows = shares[first:last]
        for position in range(positions):
            used = sorted({share.pages[position] for row in rows for share in row if position < len(share.pages)})
            for page in used:
                column = torch.zeros(3, block)
                for place, row in enumerate(rows):
                    for share in row:
                        if position < len(share.pages) and share.pages[position] == page:
                            column[:, place] += torch.tensor([share.direct, share.gather, share.spread])
                columns.append(column)
            pages += used
            entry_starts.append(len(pages))
        sums.append(int(any(share.gather != 0 for row in rows for share in row)))
    spare = max(3, capacity - len(pages))
    pages += [10**6] * spare
    columns += [torch.full((3, block), float("nan"))] * spare
    integers = (torch.tensor(numbers, dtype=torch.int32, device=DEVICE) for numbers in (bounds, pages, entry_starts, sums))
    return BlockTable(block, positions, *integers, *torch.stack(columns, dim=1).to(DEVICE).contiguous())


def random_case(seed, tokens, rank, outputs, inputs, adapters=5, widest=1, dtype=SHORT, kinds="cat linear none"):
    """Adapters of one to `widest` pages in shuffled pages; every token of one kind, with one to three adapters."""
    draws = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return float(torch.rand((), generator=draws) * (high - low) + low)

    def integer(low, high):
        return int(torch.randint(low, high, (), generator=draws))

    sizes = [integer(1, widest + 1) for _ in range(adapters - 1)] + [widest]
    order = (torch.randperm(sum(sizes), generator=draws) + 1).tolist()
    owned = [tuple(order.pop() for _ in range(size)) for size in sizes]
    shares: list[list[Share]] = []
    for _ in range(tokens):
        kind = kinds.split()[integer(0, len(kinds.split()))]
        chosen = torch.randperm(adapters, generator=draws)[: integer(1, 4)].tolist() if kind != "none" else []
        if kind == "cat":
            shares.append([Share(owned[i], uniform(0.5, 1.5) * (-1) ** integer(0, 2), 0.0, 0.0) for i in chosen])
        else:
            # Sums run over adapters of one rank, as the methods that gather demand.
            chosen = [i for i in chosen if sizes[i] == sizes[chosen[0]]]
            shares.append([Share(owned[i], 0.0, uniform(0.4, 1) * (-1) ** integer(0, 2), uniform(0.4, 1)) for i in chosen])

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=draws) * scale).to(DEVICE, dtype)

    a = normal(sum(sizes) + 1, len(outputs) * rank, inputs, scale=inputs**-0.5)
    b = normal(sum(sizes) + 1, rank, sum(outputs))
    a[0], b[0] = float("nan"), float("nan")  # A page that no token takes part in must not be read.
    return Case(shares, normal(tokens, inputs), a, b, normal(tokens, sum(outputs)), outputs)


def expected(case):
    """The base's output and the composed adapters', in float64."""
    x, a, b, y = (tensor.double().cpu() for tensor in (case.x, case.a, case.b, case.y))
    rank, modules = case.rank, len(case.outputs)
    ends = torch.tensor((0, *case.outputs)).cumsum(0).tolist()
    for token, shares in enumerate(case.shares):
        for module in range(modules):
            rows, columns = slice(module * rank, (module + 1) * rank), slice(ends[module], ends[module + 1])
            for position in range(max((len(share.pages) for share in shares), default=0)):
                present = [share for share in shares if position < len(share.pages)]
                down = [a[share.pages[position], rows] @ x[token] for share in present]
                gathered = sum(share.gather * part for share, part in zip(present, down, strict=True))
                for share, part in zip(present, down, strict=True):
                    mixed = share.direct * part + share.spread * gathered
                    y[token, columns] += mixed @ b[share.pages[position]][:, columns]
    return y


def composed(case, table):
    """The base's output and the composed adapters', from the kernels."""
    y = case.y.clone()
    add_composed_(y, case.x, case.a, case.b, table, case.outputs)
    return y


def error(found, wanted):
    return float((found.double().cpu() - wanted).norm() / wanted.norm().clamp(min=1e-9))


TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CASES = {
    "one token": ({"tokens": 1, "rank": 16, "outputs": (32,), "inputs": 48}, 16),
    "one token, three layers": ({"tokens": 1, "rank": 64, "outputs": (64, 32, 32), "inputs": 128}, 16),
    "uneven inputs, wide adapters": ({"tokens": 13, "rank": 16, "outputs": (48, 16), "inputs": 80, "widest": 3}, 16),
    "one block": ({"tokens": 30, "rank": 32, "outputs": (96, 32, 32), "inputs": 96}, 32),
    "four layers": ({"tokens": 4, "rank": 16, "outputs": (32, 16, 64, 16), "inputs": 32}, 16),
    "two blocks": ({"tokens": 70, "rank": 64, "outputs": (64, 128), "inputs": 64, "adapters": 3}, 64),
    "a large block": ({"tokens": 70, "rank": 32, "outputs": (64,), "inputs": 192, "widest": 2}, 128),
    "many blocks": ({"tokens": 90, "rank": 16, "outputs": (64,), "inputs": 64, "widest": 2}, 16),
    "full precision": ({"tokens": 10, "rank": 64, "outputs": (64,), "inputs": 112, "dtype": torch.float32}, 16),
}


@pytest.mark.parametrize("kinds", ["cat", "cat linear none"])
@pytest.mark.parametrize("name", CASES)
def test_every_token_gets_its_own_composition(name, kinds):
    settings, block = CASES[name]
    case = random_case(seed=len(name), kinds=kinds, **settings)
    base = case.y.double().cpu()
    found = composed(case, block_table(case.shares, block, settings.get("widest", 1)))
    assert error(found.double().cpu() - base, expected(case) - base) < TOLERANCE[case.x.dtype]


# NumPy, which computes for the interpreter, warns of what overflows.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kinds", ["cat", "cat linear none"])
@pytest.mark.parametrize("name", CASES)
def test_a_token_whose_products_overflow_changes_no_other_token(name, kinds):
    settings, block = CASES[name]
    case = random_case(seed=len(name), kinds=kinds, **settings)
    table = block_table(case.shares, block, settings.get("widest", 1))
    wanted = composed(case, table)
    doomed = len(case.shares) // 2
    case.x[doomed] = torch.finfo(case.x.dtype).max
    found = composed(case, table)
    others = [token for token in range(len(case.shares)) if token != doomed]
    assert torch.equal(found[others], wanted[others])
    assert not case.shares[doomed] or not found[doomed].isfinite().all()


def test_blocks_may_begin_where_prompts_begin():
    case = random_case(3, tokens=61, rank=16, outputs=(32, 16), inputs=32, widest=2)
    found = composed(case, block_table(case.shares, 32, 2, starts=(0, 1, 40, 41)))
    assert error(found, expected(case)) < TOLERANCE[SHORT]


def test_a_block_does_not_feel_the_others():
    case = random_case(5, tokens=32, rank=16, outputs=(32,), inputs=48)
    together = composed(case, block_table(case.shares, 16, 1))
    assert torch.equal(together, composed(case, block_table(case.shares, 16, 1)))
    behind = Case(case.shares[16:], case.x[16:], case.a, case.b, case.y[16:], case.outputs)
    assert torch.equal(together[16:], composed(behind, block_table(behind.shares, 16, 1)))


def test_tokens_without_adapters_keep_the_base_output():
    case = random_case(7, tokens=40, rank=16, outputs=(32,), inputs=32, kinds="none")
    case.shares[39].append(Share((1,), 0.5, 0.0, 0.0))
    found = composed(case, block_table(case.shares, 16, 1))
    assert torch.equal(found[:39], case.y[:39])
    assert not torch.equal(found[39], case.y[39])


def test_what_the_kernels_cannot_cut_is_refused():
    case = random_case(9, tokens=4, rank=16, outputs=(32,), inputs=32)
    table = block_table(case.shares, 16, 1)
    for problem, layers in (
        ("20 inputs or outputs", (case.a, case.b[..., :20].contiguous(), (20,))),
        ("ranks of a page are 8", (case.a[:, :8], case.b[:, :8], (32,))),
        ("5 layers share an input", (case.a.repeat(1, 5, 1), case.b.repeat(1, 1, 5), (32,) * 5)),
    ):
        a, b, outputs = layers
        with pytest.raises(AdapterError, match=problem):
            add_composed_(torch.zeros(4, sum(outputs), device=DEVICE), case.x, a, b, table, outputs)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_a_captured_graph_serves_other_batches():
    cases = [random_case(seed, tokens=24, rank=16, outputs=(64, 32), inputs=64) for seed in (1, 2)]
    tables = [vars(block_table(case.shares, 32, 1, capacity=16)) for case in cases]
    fixed = BlockTable(
        **{name: part.clone() if isinstance(part, torch.Tensor) else part for name, part in tables[0].items()}
    )
    x, a, b, y = (tensor.clone() for tensor in (cases[0].x, cases[0].a, cases[0].b, cases[0].y))
    add_composed_(y, x, a, b, fixed, cases[0].outputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add_composed_(y, x, a, b, fixed, cases[0].outputs)
    for case, table in zip(cases, tables, strict=True):
        for name, tensor in vars(fixed).items():
            if isinstance(tensor, torch.Tensor):
                tensor.copy_(table[name])
        for own, new in ((x, case.x), (a, case.a), (b, case.b), (y, case.y)):
            own.copy_(new)
        graph.replay()
        assert error(y, expected(case)) < TOLERANCE[SHORT]
