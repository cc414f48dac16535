"""Every method gives what PEFT's `add_weighted_adapter` gives with the same arguments on the same adapters."""

import pytest
import torch
from conftest import tiny_llama
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import PeftModel

from lorafleet.composition import METHODS, ComposedModel, Composition, load_adapter
from lorafleet.errors import AdapterError, CompositionError, UnknownAdapter

TOKENS = torch.randint(3, 500, (3, 11), generator=torch.Generator().manual_seed(1))


def composed_logits(model, folders, compositions, tokens=TOKENS):
    composed = ComposedModel(model)
    for folder in folders:
        composed.pool.add(load_adapter(folder))
    with torch.inference_mode(), composed.composed(composed.pool.plan(compositions)):
        return model(tokens).logits


def peft_model(folders):
    model = PeftModel.from_pretrained(tiny_llama(), folders[0], adapter_name=folders[0].name)
    for folder in folders[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    return model


def relative_error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@settings(
    max_examples=20,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    method=st.sampled_from(sorted(METHODS)),
    weights=st.lists(st.floats(-1.5, 1.5).filter(lambda weight: abs(weight) > 1e-3), min_size=1, max_size=4),
    density=st.sampled_from([0.2, 0.5, 0.8]),
    majority_sign=st.sampled_from(["frequency", "total"]),
    alphas=st.lists(st.sampled_from([2, 8, 16]), min_size=4, max_size=4),
)
def test_every_method_equals_peft(make_adapter, method, weights, density, majority_sign, alphas):
    folders = [make_adapter(f"a{i}", alpha=alphas[i], seed=i) for i in range(len(weights))]
    names = [folder.name for folder in folders]
    reference = peft_model(folders)
    options = {"density": density} if method in ("ties", "magnitude_prune") else {}
    if method == "ties":
        options["majority_sign_method"] = majority_sign
    reference.add_weighted_adapter(names, weights, "merged", combination_type=method, **options)
    reference.set_adapter("merged")
    with torch.inference_mode():
        wanted = reference(TOKENS).logits
    composition = Composition(method, dict(zip(names, weights, strict=True)), density, majority_sign)
    assert relative_error(composed_logits(tiny_llama(), folders, [composition] * 3), wanted) < 1e-5


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_weight_of_one_is_the_adapter_alone(make_adapter, method):
    folders = [make_adapter("x", seed=1), make_adapter("y", seed=2)]
    reference = peft_model(folders)
    reference.set_adapter("y")
    with torch.inference_mode():
        wanted = reference(TOKENS).logits
    found = composed_logits(tiny_llama(), folders, [Composition(method, {"y": 1.0}, density=0.3)] * 3)
    assert relative_error(found, wanted) < 1e-5


def test_rank_stabilised_adapter_alone_equals_peft(make_adapter):
    folder = make_adapter("stable", rank=9, alpha=6, use_rslora=True)
    with torch.inference_mode():
        wanted = peft_model([folder])(TOKENS).logits
    assert relative_error(composed_logits(tiny_llama(), [folder], [Composition("cat", {"stable": 1.0})] * 3), wanted) < 1e-5


def test_cat_of_mixed_ranks_and_partial_cover_equals_peft(make_adapter):
    folders = [make_adapter("wide", rank=8), make_adapter("thin", rank=2, target_modules=["q_proj", "down_proj"])]
    reference = peft_model(folders)
    reference.add_weighted_adapter(["wide", "thin"], [0.7, -0.4], "merged", combination_type="cat")
    reference.set_adapter("merged")
    with torch.inference_mode():
        wanted = reference(TOKENS).logits
    found = composed_logits(tiny_llama(), folders, [Composition("cat", {"wide": 0.7, "thin": -0.4})] * 3)
    assert relative_error(found, wanted) < 1e-5


def test_a_row_does_not_feel_its_neighbours(make_adapter):
    folders = [make_adapter(f"n{i}", rank=4, seed=i) for i in range(5)]
    compositions = [
        Composition("linear", {"n0": 0.6, "n1": 0.4}),
        Composition("ties", {"n0": 0.5, "n1": 0.3, "n2": 0.2}, density=0.5),
        Composition("ties", {"n0": 0.9, "n3": 0.1}, density=0.5),
        Composition("cat", {"n4": -0.5, "n2": 1.2}),
        Composition("magnitude_prune", {"n3": 0.5, "n4": 0.5}),
        Composition(),
    ]
    tokens = torch.randint(3, 500, (len(compositions), 7), generator=torch.Generator().manual_seed(2))
    model = tiny_llama()
    together = composed_logits(model, folders, compositions, tokens)
    for row, composition in enumerate(compositions):
        alone = composed_logits(tiny_llama(), folders, [composition], tokens[row : row + 1])
        assert relative_error(together[row : row + 1], alone) < 1e-5
    with torch.inference_mode():
        assert torch.equal(
            tiny_llama()(tokens[-1:]).logits, composed_logits(tiny_llama(), folders, [Composition()], tokens[-1:])
        )


def test_adding_and_removing_adapters_changes_no_other_answer(make_adapter):
    composed = ComposedModel(tiny_llama())
    for name in ("one", "two", "three"):
        composed.pool.add(load_adapter(make_adapter(name, seed=len(name) + ord(name[0]))))
    ties = Composition("ties", {"one": 0.5, "two": 0.5}, density=0.5)

    def logits():
        with torch.inference_mode(), composed.composed(composed.pool.plan([ties] * 3)):
            return composed.model(TOKENS).logits

    before = logits()
    composed.pool.add(load_adapter(make_adapter("four", seed=99)))
    composed.pool.remove("three")
    assert torch.equal(before, logits())
    composed.pool.add(load_adapter(make_adapter("two", seed=123)))
    assert relative_error(logits(), before) > 1e-3, "a replaced adapter must not answer from what was prepared before"


def test_what_cannot_be_composed_is_refused_by_name(make_adapter, tmp_path):
    composed = ComposedModel(tiny_llama())
    with pytest.raises(AdapterError, match="DoRA"):
        load_adapter(make_adapter("dora", use_dora=True))
    composed.pool.add(load_adapter(make_adapter("four", rank=4)))
    composed.pool.add(load_adapter(make_adapter("two", rank=2)))
    with pytest.raises(CompositionError, match="four 4, two 2"):
        composed.pool.plan([Composition("linear", {"four": 0.5, "two": 0.5})])
    with pytest.raises(UnknownAdapter, match="Did you mean four"):
        composed.pool.plan([Composition("cat", {"fuor": 1.0})])
    with pytest.raises(CompositionError, match=r"weights\.four is nan"):
        Composition("cat", {"four": float("nan")})
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        load_adapter(tmp_path / "nowhere")
