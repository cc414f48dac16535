"""Every method against its formula in float64, and what a method must hold to whatever the adapters."""

import math

import pytest
import torch
from composition.adapters_in_memory import changes, pool_of, random_adapter, relative_error
from composition.formulas import best_of_rank, elected, largest_kept, outputs_added, parameters_added
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lorafleet.composition import METHODS, Composition
from lorafleet.composition.methods.dare import keep_at_random
from lorafleet.composition.methods.svd import decompose

LINEAR = ["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]
NEED_ONE_RANK = [*LINEAR, "fusion"]
IGNORE_THE_SIZE = ["fusion", "mixture", "selection"]


def fleet(alphas, rank=6, mixed=False):
    return [
        random_adapter(f"a{number}", rank=rank + number * mixed, alpha=alpha, seed=number)
        for number, alpha in enumerate(alphas)
    ]


def expected(method, adapters, weights, density, majority_sign):
    """What the formulas add to each layer's weight."""
    found = {}
    for module in adapters[0].layers:
        layers = [adapter.layers[module] for adapter in adapters]
        scales, names = [layer.scale for layer in layers], [adapter.name for adapter in adapters]
        share = [1 / len(layers)] * len(layers)
        a, b = [layer.a for layer in layers], [layer.b for layer in layers]
        if len(adapters) > 1:
            a, b = (prepared(method, half, module, names, density, majority_sign) for half in (a, b))
        if method == "selection":
            share = [float(weight == max(weights)) for weight in weights]
        given_weights = share if method in IGNORE_THE_SIZE else weights
        if method in ("cat", "mixture", "selection"):
            found[module] = outputs_added(a, b, scales, given_weights)
        elif method == "svd":
            found[module] = outputs_added(a, b, scales, weights)
            if len(adapters) > 1:
                found[module] = best_of_rank(found[module], max(layer.rank for layer in layers))
        else:
            found[module] = parameters_added(a, b, scales, given_weights)
    return found


def prepared(method, halves, module, names, density, majority_sign):
    if method in ("magnitude_prune", "ties"):
        halves = [largest_kept(half, density) for half in halves]
    if method in ("dare_linear", "dare_ties"):
        drawn = [
            half[0] for half in keep_at_random([torch.ones_like(half)[None] for half in halves], [module], names, density)
        ]
        halves = [half.double() * (kept != 0) / density for half, kept in zip(halves, drawn, strict=True)]
    return elected(halves, majority_sign) if method in ("ties", "dare_ties") else halves


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_its_formula(method):
    # Whole numbers divided by these stay exact, so that a draw in the election stays a draw.
    exact, hundredths = st.sampled_from([0.25, 0.5, 1.0]), st.integers(5, 100).map(lambda percent: percent / 100)
    densities = exact if method == "dare_ties" else hundredths

    @settings(max_examples=30, deadline=None, phases=[Phase.explicit, Phase.generate])
    @given(
        weights=st.lists(st.floats(-2, 2).filter(lambda weight: abs(weight) > 1e-3), min_size=1, max_size=5, unique=True),
        alphas=st.lists(st.floats(0.5, 64), min_size=5, max_size=5),
        rank=st.integers(1, 8),
        density=densities,
        majority_sign=st.sampled_from(["frequency", "total"]),
        page_rank=st.sampled_from([1, 3, 16]),
    )
    def check(weights, alphas, rank, density, majority_sign, page_rank):
        adapters = fleet(alphas[: len(weights)], rank, mixed=method not in NEED_ONE_RANK)
        by_name = {adapter.name: weight for adapter, weight in zip(adapters, weights, strict=True)}
        found = changes(pool_of(*adapters, page_rank=page_rank), Composition(method, by_name, density, majority_sign))
        for module, wanted in expected(method, adapters, weights, density, majority_sign).items():
            assert relative_error(found[module], wanted) < 1e-5

    check()


@pytest.mark.parametrize("method", METHODS)
def test_each_adapter_has_its_own_alpha(method):
    """Four times the alpha of one adapter is four times its weight, and no other's."""
    adapters = fleet([8, 8, 8])
    raised = [random_adapter("a0", rank=6, alpha=32, seed=0), *adapters[1:]]
    weights = {"a0": 0.3, "a1": 0.5, "a2": -0.4}
    found = changes(pool_of(*raised), Composition(method, weights, 0.5))
    if method in IGNORE_THE_SIZE:
        wanted = expected(method, raised, list(weights.values()), 0.5, "frequency")
    else:
        wanted = changes(pool_of(*adapters), Composition(method, weights | {"a0": 1.2}, 0.5))
    for module in wanted:
        assert relative_error(found[module], wanted[module]) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_not_squared(method):
    """A third of every weight is a third of the answer; a negative of every weight is its negative."""
    pool = pool_of(*fleet([4, 8, 16]))
    weights = {"a0": 0.6, "a1": -0.3, "a2": 0.9}
    whole = changes(pool, Composition(method, weights, 0.5))
    thirds = changes(pool, Composition(method, {name: weight / 3 for name, weight in weights.items()}, 0.5))
    for module, wanted in whole.items():
        assert relative_error(thirds[module], wanted if method in IGNORE_THE_SIZE else wanted / 3) < 1e-5
    if method not in IGNORE_THE_SIZE:
        negative = changes(pool, Composition(method, {name: -weight for name, weight in weights.items()}, 0.5))
        for module, wanted in whole.items():
            assert relative_error(negative[module], -wanted) < 1e-5


@pytest.mark.parametrize(("method", "same_as"), [("fusion", "linear"), ("mixture", "cat")])
def test_uniform_methods_count_every_adapter_the_same(method, same_as):
    pool = pool_of(*fleet([4, 8, 16]))
    found = changes(pool, Composition(method, {"a0": 0.7, "a1": -3.0, "a2": 0.01}))
    wanted = changes(pool, Composition(same_as, dict.fromkeys(("a0", "a1", "a2"), 1 / 3)))
    assert all(torch.equal(found[module], wanted[module]) for module in wanted)


def test_selection_is_the_heaviest_adapter_alone_and_whole():
    pool = pool_of(*fleet([4, 8, 16]))

    def answers(weights, name):
        found, wanted = changes(pool, Composition("selection", weights)), changes(pool, Composition("cat", {name: 1.0}))
        return all(torch.equal(found[module], wanted[module]) for module in wanted)

    assert answers({"a0": 0.2, "a1": 0.5, "a2": 0.3}, "a1")
    assert answers({"a2": 0.5, "a1": 0.5, "a0": -0.9}, "a1"), "of equal weights the first by name"
    assert answers({"a0": -2.0, "a1": -0.1}, "a1")


def test_an_adapter_of_weight_zero_takes_no_part():
    pool = pool_of(*fleet([4, 8, 16]))
    for method in METHODS:
        found = changes(pool, Composition(method, {"a0": 0.7, "a1": 0.0, "a2": 0.6}, 0.5))
        wanted = changes(pool, Composition(method, {"a0": 0.7, "a2": 0.6}, 0.5))
        assert all(torch.equal(found[module], wanted[module]) for module in wanted), method
        nothing = changes(pool, Composition(method, {"a0": 0.0, "a1": 0.0}))
        assert not any(change.any() for change in nothing.values()), method


def test_pruning_to_everything_is_linear():
    pool = pool_of(*fleet([4, 8, 16]))
    weights = {"a0": 0.6, "a1": -0.3, "a2": 0.9}
    wanted = changes(pool, Composition("linear", weights))
    for method in ("magnitude_prune", "dare_linear"):
        found = changes(pool, Composition(method, weights, density=1.0))
        assert all(torch.equal(found[module], wanted[module]) for module in wanted), method


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_its_share_and_scales_what_it_keeps(density):
    half = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    (kept,) = keep_at_random([half[None]], ["model.layers.0.mlp.up_proj"], ["one"], density)[0]
    survivors = kept != 0
    # The binomial's deviation, five times.
    assert abs(float(survivors.float().mean()) - density) < 5 * math.sqrt(density * (1 - density) / half.numel())
    torch.testing.assert_close(kept[survivors], half[survivors] / density, rtol=1e-6, atol=0)
    # So the mean stays what it was: sum of half^2 against kept * half, of which each term's deviation is known.
    energy = half.double() ** 2
    deviation = math.sqrt(float((energy**2).sum()) * (1 - density) / density)
    assert abs(float((kept.double() * half.double()).sum() - energy.sum())) < 5 * deviation


def test_dare_drops_other_values_in_every_layer_half_and_adapter():
    ones = torch.ones(64, 64)

    def survivors(name, module, half=ones):
        return keep_at_random([half[None]], [module], [name], 0.5)[0] != 0

    masks = [
        survivors("one", "model.layers.0.mlp.up_proj"),
        survivors("one", "model.layers.1.mlp.up_proj"),
        survivors("one", "model.layers.0.mlp.down_proj"),
        survivors("two", "model.layers.0.mlp.up_proj"),
        survivors("one", "model.layers.0.mlp.up_proj", torch.ones(32, 128)).view(64, 64),
    ]
    for number, mask in enumerate(masks):
        for other in masks[:number]:
            # Independent masks agree on half of the values; the deviation is 1/128.
            assert abs(float((mask == other).float().mean()) - 0.5) < 5 / 128


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_draws_the_same_in_every_pool_and_leaves_other_draws_alone(method):
    composition = Composition(method, {"a0": 0.5, "a1": 0.5, "a2": -0.7}, 0.4)
    torch.manual_seed(1)
    first = changes(pool_of(*fleet([8, 8, 8])), composition)
    drawn = torch.rand(4)
    torch.manual_seed(2)
    other_order = fleet([8, 8, 8])[::-1]
    second = changes(pool_of(*other_order, page_rank=16), composition)
    for module in first:
        assert relative_error(second[module], first[module]) < 1e-6
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(4)), "the draw must not touch the generator that sampling uses"


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_weights_does_not_matter(method):
    pool = pool_of(*fleet([4, 8, 16]))
    weights = {"a0": 0.6, "a1": -0.3, "a2": 0.9}
    found = changes(pool, Composition(method, dict(reversed(weights.items())), 0.5))
    for module, wanted in changes(pool, Composition(method, weights, 0.5)).items():
        assert torch.equal(found[module], wanted)


@pytest.mark.parametrize("case", ["the same A", "one direction", "no A", "no B", "more ranks than inputs"])
def test_svd_is_the_best_of_its_rank_where_the_adapters_leave_no_triangle(case):
    draws = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=draws).double() for shape in ((24, 48), (40, 72)))
    stacked = {
        "the same A": torch.cat([a, a, a]),
        "one direction": torch.cat([1e-3 * a + 100 * a[:1]] * 3),
        "no A": torch.zeros(72, 48).double(),
        "no B": torch.cat([a, a, a]),
        "more ranks than inputs": torch.randn(72, 48, generator=draws).double(),
    }[case]
    b = b * (case != "no B")
    (a_root,), (b_root,) = decompose(stacked[None], b[None])
    wanted = best_of_rank(b @ stacked, 8)
    assert float((b_root[:, :8] @ a_root[:8] - wanted).norm()) <= 1e-6 * float(wanted.norm())
