"""Layers that share an input become one product, and answer as they did before, whoever calls them and in which order."""

import pytest
import torch
from composition.adapters_in_memory import relative_error
from conftest import tiny_llama
from torch import nn

from lorafleet.composition import ComposedModel
from lorafleet.composition.groups import layer_groups


class Attention(nn.Module):
    """Projections of one input, of the sorts that a model may have."""

    def __init__(self, bias=(False, False, False), kinds=(nn.Linear, nn.Linear, nn.Linear), inputs=(8, 8, 8)):
        super().__init__()
        names = ("q_proj", "k_proj", "v_proj")
        for name, kind, width, outputs, biased in zip(names, kinds, inputs, (8, 4, 4), bias, strict=True):
            setattr(self, name, kind(width, outputs, bias=biased))


class Packed(nn.Linear):
    """Stands for a layer whose weight is stored in another way."""


def test_a_llama_has_four_groups_in_a_layer():
    first, second = "model.layers.0", "model.layers.1"
    groups = layer_groups(tiny_llama())
    assert [group.modules for group in groups] == [
        modules
        for layer in (first, second)
        for modules in (
            tuple(f"{layer}.self_attn.{name}_proj" for name in "qkv"),
            (f"{layer}.self_attn.o_proj",),
            (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"),
            (f"{layer}.mlp.down_proj",),
        )
    ]
    assert groups[0].inputs == 32
    assert groups[0].outputs == (32, 16, 16)
    assert groups[0].starts == (0, 32, 48, 64)


@pytest.mark.parametrize(
    "different",
    [{"bias": (True, True, False)}, {"kinds": (Packed, Packed, Packed)}, {"inputs": (8, 8, 6)}],
    ids=["bias", "kind", "input"],
)
def test_layers_that_cannot_become_one_stay_by_themselves(different):
    groups = layer_groups(nn.ModuleDict({"attention": Attention(**different)}))
    assert [group.modules for group in groups] == [(f"attention.{name}_proj",) for name in "qkv"]


def test_siblings_of_which_one_is_missing_stay_by_themselves():
    model = nn.ModuleDict({"attention": Attention()})
    del model["attention"].v_proj
    assert [group.modules for group in layer_groups(model)] == [("attention.q_proj",), ("attention.k_proj",)]


@pytest.mark.parametrize("biased", [True, False])
def test_every_layer_answers_by_its_own_input_in_any_order(biased):
    torch.manual_seed(0)
    attention = Attention(bias=(biased,) * 3).requires_grad_(False)
    before = {name: (layer.weight.clone(), layer.bias) for name, layer in attention.named_children()}
    ComposedModel(nn.ModuleDict({"attention": attention}))
    x, other = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    calls = ["q x", "k x", "v x", "k x", "q other", "k x", "v other", "q x", "q x", "v other", "k other", "v x"]
    for call in calls:
        name, given = f"{call[0]}_proj", x if call.endswith(" x") else other
        weight, bias = before[name]
        assert relative_error(getattr(attention, name)(given), nn.functional.linear(given, weight, bias)) < 1e-6, call
