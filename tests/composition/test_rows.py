"""Rows of one batch, each with its own composition: none feels the others, or what the pool did before or meanwhile."""

import dataclasses

import pytest
import torch
from composition.adapters_in_memory import Shape, in_peft, relative_error, taken_from
from conftest import tiny_llama

from lorafleet.composition import BASE, METHODS, Adapter, ComposedModel, Composition, LowRank
from lorafleet.composition.plan import TOKENS_ALONE
from lorafleet.errors import CompositionError

SHAPES = {
    "one": Shape(rank=4, alpha=3),
    "two": Shape(rank=4, alpha=8, modules=("q_proj", "v_proj", "down_proj")),
    "three": Shape(rank=4, alpha=13),
    "long": Shape(rank=10, alpha=20),
    "tall": Shape(rank=10, alpha=5, modules=("k_proj", "o_proj", "up_proj")),
}
EVERY_METHOD = [
    *(Composition(method, {"one": 0.6, "two": -0.3, "three": 0.7}, 0.5) for method in METHODS),
    *(Composition(method, {"long": 0.8, "tall": 0.4}, 0.3, "total") for method in METHODS),
    Composition("cat", {"two": 1.0}),
    Composition("cat", {"one": -0.2, "long": 0.5, "two": 0.1, "tall": 0.3, "three": -1.1}),
    BASE,
]


@pytest.fixture(scope="module")
def adapters():
    model = in_peft(SHAPES, seed=3)
    return {name: taken_from(model, name) for name in SHAPES}


def composed_model(adapters, pages=96, page_rank=4):
    composed = ComposedModel(tiny_llama(), pages=pages, page_rank=page_rank)
    for adapter in adapters.values():
        composed.pool.add(adapter)
    return composed


def some_tokens(rows, tokens):
    return torch.randint(3, 500, (rows, tokens), generator=torch.Generator().manual_seed(2))


def logits(composed, compositions, tokens):
    with torch.inference_mode(), composed.composed(compositions, tokens.shape[1]):
        return composed.model(tokens).logits


@pytest.mark.parametrize("length", [1, 9, TOKENS_ALONE + 3])
def test_a_batch_of_every_method_equals_its_rows_alone(adapters, length):
    tokens = some_tokens(len(EVERY_METHOD), length)
    together = logits(composed_model(adapters), EVERY_METHOD, tokens)
    for row, composition in enumerate(EVERY_METHOD):
        alone = logits(composed_model(adapters), [composition], tokens[row : row + 1])
        assert relative_error(together[row : row + 1], alone) < 1e-5, composition


def test_every_composition_makes_a_difference(adapters):
    *composed, base = logits(composed_model(adapters), EVERY_METHOD, some_tokens(1, 9).expand(len(EVERY_METHOD), -1))
    for composition, found in zip(EVERY_METHOD[:-1], composed, strict=True):
        assert relative_error(found, base) > 1e-3, composition


def test_a_row_without_adapters_is_the_base_model(adapters):
    composed, tokens = composed_model(adapters), some_tokens(3, 8)
    with torch.inference_mode():
        base = composed.model(tokens).logits
        assert relative_error(base, tiny_llama()(tokens).logits) < 1e-6
    rows = [BASE, Composition("linear", {"one": 0.0}), Composition("cat", {"one": 1.0})]
    found = logits(composed, rows, tokens)
    assert torch.equal(found[:2], base[:2])
    assert not torch.allclose(found[2], base[2], atol=1e-3)
    with torch.inference_mode():
        assert torch.equal(composed.model(tokens).logits, base), "nothing stays behind"


def test_other_weights_answer_at_once(adapters):
    """PEFT keeps the adapter that has the name already, with the weights from before."""
    composed, tokens = composed_model(adapters), some_tokens(1, 8)
    for method in METHODS:
        for weights in ({"one": 0.5, "three": 0.5}, {"one": 0.9, "three": -0.1}, {"one": 0.1, "three": 0.5}):
            composition = Composition(method, weights, 0.5)
            wanted = logits(composed_model(adapters), [composition], tokens)
            assert relative_error(logits(composed, [composition], tokens), wanted) < 1e-5, composition


@pytest.mark.parametrize("method", METHODS)
def test_a_replaced_adapter_does_not_answer_from_what_was_prepared_before(adapters, method):
    composed, tokens = composed_model(adapters), some_tokens(1, 8)
    composition = Composition(method, {"one": 0.9, "three": -0.4}, 0.5)
    before = logits(composed, [composition], tokens)
    layers = {module: LowRank(layer.a.flip(0), layer.b, layer.scale) for module, layer in adapters["one"].layers.items()}
    replaced = adapters | {"one": Adapter("one", layers)}
    composed.pool.add(replaced["one"])
    found = logits(composed, [composition], tokens)
    assert relative_error(found, before) > 1e-3
    assert relative_error(found, logits(composed_model(replaced), [composition], tokens)) < 1e-5


def test_adding_and_removing_adapters_changes_no_other_answer(adapters):
    composed = composed_model(adapters)
    rows = [composition for composition in EVERY_METHOD if composition.weights.keys() <= {"one", "two", "three"}]
    tokens = some_tokens(len(rows), 8)
    for name in ("one", "tall"):
        # So that tall's pages lie between those of the rows.
        logits(composed, [Composition("cat", {name: 1.0})], tokens[:1])
    before = logits(composed, rows, tokens)
    for name in ("new", "newer"):
        composed.pool.add(dataclasses.replace(adapters["long"], name=name))
        assert torch.equal(logits(composed, rows, tokens), before)
    composed.pool.remove("tall")
    assert torch.equal(logits(composed, rows, tokens), before)
    # Something else is brought into the pages that tall has left.
    logits(composed, [Composition("ties", {"new": 0.5, "newer": 1.5})], tokens[:1])
    assert torch.equal(logits(composed, rows, tokens), before)
    composed.pool.remove("new")
    composed.pool.remove("long")
    assert torch.equal(logits(composed, rows, tokens), before)


def test_adapters_come_and_go_while_rows_are_on_their_way(adapters):
    composed, tokens = composed_model(adapters, pages=8), some_tokens(1, 8)
    composition = Composition("linear", {"one": 0.6, "three": 0.4})
    others = [Composition("cat", {name: 1.0}) for name in ("long", "tall", "two")]
    with torch.inference_mode(), composed.composed([composition], 8):
        wanted = composed.model(tokens).logits
        for other in others:
            lease = composed.pool.lease(composed.pool.recipe(other))
            assert lease is not None
            composed.pool.release(lease)
        composed.pool.remove("one")
        composed.pool.add(dataclasses.replace(adapters["two"], name="three"))
        assert torch.equal(composed.model(tokens).logits, wanted)


def test_rows_that_do_not_fit_in_together_are_refused_and_let_go(adapters):
    composed, tokens = composed_model(adapters, pages=4), some_tokens(2, 8)
    wide = [Composition("cat", {"long": 1.0}), Composition("cat", {"tall": 1.0})]
    with pytest.raises(CompositionError, match="the pool's room for 16 ranks is too small"):
        logits(composed, wide, tokens)
    for composition in wide:
        wanted = logits(composed_model(adapters), [composition], tokens[:1])
        assert relative_error(logits(composed, [composition], tokens[:1]), wanted) < 1e-5
