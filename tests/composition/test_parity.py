"""Every method gives what PEFT's `add_weighted_adapter` gives with the same arguments on the same adapters."""

import math
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from composition.adapters_in_memory import Shape, changes, in_peft, lora_layers, relative_error, taken_from
from composition.formulas import outputs_added, parameters_added
from conftest import MODULES, tiny_llama
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.utils import merge_utils

from lorafleet.composition import METHODS, Adapter, ComposedModel, Composition, LowRank, load_adapter
from lorafleet.composition.methods.dare import keep_at_random

TOKENS = torch.randint(3, 500, (3, 11), generator=torch.Generator().manual_seed(1))
RANDOM = {"dare_linear", "dare_ties"}
EQUAL_RANKS = {"linear", "ties", "magnitude_prune", "fusion", *RANDOM}
TOLERANCE = {"svd": 1e-4}  # PEFT decomposes in float32.

covers = st.sampled_from([tuple(MODULES), tuple(MODULES), ("q_proj", "v_proj"), ("k_proj", "o_proj", "down_proj")])
ranks = st.integers(1, 12)
alphas = st.sampled_from([1, 2, 8, 13, 24])
PATTERNS = ("v_proj", "down_proj", "layers.1.self_attn.v_proj")
weights = st.floats(-1.5, 1.5).filter(lambda weight: abs(weight) > 1e-3)


@st.composite
def fleets(draw, one_rank):
    """The shapes of one to five adapters, and their weights."""

    def pattern(values):
        return draw(st.dictionaries(st.sampled_from(PATTERNS), values, max_size=1))

    rank = draw(ranks)
    rank_pattern = pattern(st.integers(1, rank))
    shapes = {}
    for number in range(draw(st.integers(1, 5))):
        if not one_rank:
            rank = draw(ranks)
            rank_pattern = pattern(st.integers(1, rank))
        shapes[f"a{number}"] = Shape(rank, draw(alphas), draw(covers), rank_pattern, pattern(alphas))
    return shapes, {name: draw(weights) for name in shapes}


@contextmanager
def our_draws(model):
    """Let PEFT drop the values that the pool drops; how it does so and scales the others stays its own."""
    owners = {
        half.data_ptr(): (name, module)
        for module, layer in lora_layers(model).items()
        for name in layer.lora_A
        for half in (layer.lora_A[name].weight, layer.lora_B[name].weight)
    }
    prune = merge_utils.random_pruning

    def pruned(tensor, density, rescale):
        name, module = owners[tensor.data_ptr()]
        ((kept,),) = keep_at_random([torch.ones_like(tensor)[None]], [module], [name], density)
        with patch("torch.bernoulli", lambda _: (kept != 0).float()):
            return prune(tensor, density, rescale=rescale)

    with patch.object(merge_utils, "random_pruning", pruned):
        yield


def merge_in_peft(model, composition):
    """Add the composition's adapter to the model as "merged", by PEFT, from the arguments that are meant by it."""
    names, given_weights = list(composition.weights), list(composition.weights.values())
    uniform = [1 / len(names)] * len(names)
    heaviest = max(composition.weights, key=composition.weights.__getitem__)
    method, names, given_weights = {
        "fusion": ("linear", names, uniform),
        "mixture": ("cat", names, uniform),
        "selection": ("cat", [heaviest], [1.0]),
    }.get(composition.method, (composition.method, names, given_weights))
    with our_draws(model):
        model.add_weighted_adapter(
            names,
            given_weights,
            "merged",
            combination_type=method,
            density=composition.density,
            majority_sign_method=composition.majority_sign,
        )


def changes_in_peft(model, name):
    return {module: layer.get_delta_weight(name) for module, layer in lora_layers(model).items() if name in layer.lora_A}


def logits_in_peft(model, name="merged"):
    model.set_adapter(name)
    with torch.inference_mode():
        return model(TOKENS).logits


def composed_model(adapters, page_rank=4):
    composed = ComposedModel(tiny_llama(), pages=32, page_rank=page_rank)
    for adapter in adapters:
        composed.pool.add(adapter)
    return composed


def logits(composed, composition):
    with torch.inference_mode(), composed.composed([composition] * len(TOKENS), TOKENS.shape[1]):
        return composed.model(TOKENS).logits


def settled(model, composition, rank):
    """The layers of which float32 can tell the best approximation of that rank: the next singular value is smaller."""
    found = set()
    for module, layer in lora_layers(model).items():
        parts = [
            weight * layer.get_delta_weight(name).double()
            for name, weight in composition.weights.items()
            if name in layer.lora_A
        ]
        values = torch.linalg.svdvals(torch.stack(parts).sum(dim=0))
        if rank >= len(values) or values[rank] < 0.98 * values[rank - 1]:
            found.add(module)
    return found


@pytest.mark.filterwarnings("ignore:The density:UserWarning", "ignore:The following .*_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_equals_peft(method):
    @settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.generate])
    @given(
        fleet=fleets(one_rank=method in EQUAL_RANKS),
        density=st.one_of(st.just(1.0), st.floats(0.1, 1)),
        majority_sign=st.sampled_from(["frequency", "total"]),
        page_rank=st.sampled_from([4, 16]),
        seed=st.integers(0, 2**31),
    )
    def check(fleet, density, majority_sign, page_rank, seed):
        shapes, given_weights = fleet
        model = in_peft(shapes, seed)
        adapters = [taken_from(model, name) for name in shapes]
        composition = Composition(method, given_weights, density, majority_sign)
        composed = composed_model(adapters, page_rank)
        compared = set(lora_layers(model))
        if method == "svd" and len(shapes) > 1:
            compared = settled(model, composition, max(adapter.rank for adapter in adapters))
        merge_in_peft(model, composition)
        wanted = changes_in_peft(model, "merged")
        found = changes(composed.pool, composition)
        assert not any(found[module].any() for module in set(found) - set(wanted))
        for module in compared & set(wanted):
            assert relative_error(found[module], wanted[module]) < TOLERANCE.get(method, 1e-5), module
        if compared == set(lora_layers(model)):
            assert relative_error(logits(composed, composition), logits_in_peft(model)) < TOLERANCE.get(method, 1e-5)

    check()


@pytest.mark.parametrize("method", METHODS)
def test_a_single_adapter_answers_whole_whatever_the_method(method):
    shapes = {"x": Shape(rank=3), "y": Shape(rank=6, alpha=5)}
    model = in_peft(shapes)
    composed = composed_model([taken_from(model, name) for name in shapes])
    alone = Composition(method, {"y": 1.0}, density=0.3)
    assert relative_error(logits(composed, alone), logits_in_peft(model, "y")) < 1e-5


@pytest.mark.parametrize("majority_sign", ["frequency", "total"])
@pytest.mark.parametrize("method", METHODS)
def test_through_files_and_a_whole_model(make_adapter, method, majority_sign):
    folders = [
        make_adapter("plain", rank=6, alpha=8, seed=1),
        make_adapter("queries", rank=6, alpha=24, seed=2, target_modules=["q_proj", "v_proj", "down_proj"]),
        make_adapter("patterned", rank=6, alpha=5, seed=3, alpha_pattern={"layers.0.mlp.up_proj": 48, "v_proj": 2}),
    ]
    model = PeftModel.from_pretrained(tiny_llama(), folders[0], adapter_name="plain")
    for folder in folders[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    composition = Composition(method, {"plain": 0.5, "queries": -0.2, "patterned": 0.9}, 0.6, majority_sign)
    merge_in_peft(model, composition)
    composed = composed_model([load_adapter(folder) for folder in folders])
    assert relative_error(logits(composed, composition), logits_in_peft(model)) < TOLERANCE.get(method, 1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}, "alpha_pattern": {"v_proj": 40, "layers.0.*k_proj": 3}},
        {"use_rslora": True, "rank_pattern": {".*_proj": 3}, "alpha_pattern": {"up_proj": 1}},
        {"target_modules": "model.layers.1.mlp.(up|down)_proj"},
    ],
    ids=["rank-stabilised", "patterns", "both", "a few layers"],
)
def test_an_adapter_is_read_as_peft_reads_it(make_adapter, config):
    folder = make_adapter("read", rank=9, alpha=6, **config)
    found = load_adapter(folder)
    wanted = taken_from(PeftModel.from_pretrained(tiny_llama(), folder, adapter_name="read"), "read")
    assert found.layers.keys() == wanted.layers.keys()
    for module, layer in wanted.layers.items():
        assert found.layers[module].scale == pytest.approx(layer.scale, rel=1e-12)
        assert torch.equal(found.layers[module].a, layer.a)
        assert torch.equal(found.layers[module].b, layer.b)


@pytest.mark.parametrize("method", ["cat", "linear", "ties", "dare_ties"])
def test_an_adapter_saved_in_half_precision_is_computed_in_float32_as_in_peft(method):
    shapes = {"one": Shape(alpha=3), "two": Shape(alpha=8), "three": Shape(alpha=13)}
    model = in_peft(shapes)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(parameter.bfloat16())
    composition = Composition(method, {"one": 0.3, "two": -0.6, "three": 0.9}, density=0.3, majority_sign="total")
    composed = composed_model([])
    for name in shapes:
        adapter = taken_from(model, name)
        halves = {
            module: LowRank(layer.a.bfloat16(), layer.b.bfloat16(), layer.scale) for module, layer in adapter.layers.items()
        }
        composed.pool.add(Adapter(name, halves))
    merge_in_peft(model, composition)
    found = changes(composed.pool, composition)
    for module, wanted in changes_in_peft(model, "merged").items():
        assert relative_error(found[module], wanted) < 1e-5


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_rank_stabilised_adapters_are_composed_by_their_own_scale_where_peft_overscales(method):
    """PEFT 0.21.2 gives the merged adapter use_rslora of the first one: alpha and rank are the same number there, and the
    scale that should be 1 is sqrt(rank). Where the first one is not rank-stabilised, PEFT is right.
    """
    given_weights = {"stable": 0.7, "also": -0.4, "plain": 0.2}
    shapes = {"stable": Shape(4, 6, rank_stabilised=True), "also": Shape(4, 3, rank_stabilised=True), "plain": Shape(4, 8)}
    model = in_peft(shapes)
    adapters = {name: taken_from(model, name) for name in shapes}
    found = changes(composed_model(adapters.values()).pool, Composition(method, given_weights))
    merged_rank = 4 if method == "linear" else 12
    for order, overscale in ((["stable", "also", "plain"], math.sqrt(merged_rank)), (["plain", "also", "stable"], 1.0)):
        merged = f"merged after {order[0]}"
        model.add_weighted_adapter(order, [given_weights[name] for name in order], merged, combination_type=method)
        for module, in_peft_changed in changes_in_peft(model, merged).items():
            layers = [adapters[name].layers[module] for name in shapes]
            scales = [6 / math.sqrt(4), 3 / math.sqrt(4), 8 / 4]
            halves = [layer.a for layer in layers], [layer.b for layer in layers]
            wanted = (
                parameters_added(*halves, scales, list(given_weights.values()))
                if method == "linear"
                else outputs_added(*halves, scales, list(given_weights.values()))
            )
            assert relative_error(found[module], wanted) < 1e-5
            assert relative_error(in_peft_changed, wanted * overscale) < 1e-5


def test_svd_keeps_the_largest_rank_of_any_layer_as_peft_does():
    """A layer that only the thin adapters change is not cut to their rank: PEFT gives every layer the largest rank."""
    shapes = {
        "wide": Shape(rank=6, modules=("q_proj",)),
        "thin": Shape(rank=2, modules=("v_proj",)),
        "slim": Shape(rank=2, modules=("v_proj",)),
    }
    model = in_peft(shapes)
    adapters = [taken_from(model, name) for name in shapes]
    composition = Composition("svd", {"wide": 0.5, "thin": 0.8, "slim": -0.7})
    merge_in_peft(model, composition)
    found = changes(composed_model(adapters, page_rank=16).pool, composition)
    for module, wanted in changes_in_peft(model, "merged").items():
        assert relative_error(found[module], wanted) < 1e-4
