"""Tiny random models of the families that the engine serves, and random adapters on them, in memory and in PEFT."""

from typing import Any

import torch
from conftest import MODULES
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_language_model import BOS, EOS
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from lorafleet.composition import Adapter, LowRank

WINDOW = 8
NEVER = 10**6
"""An end token that no model gives: every answer has its full length."""
SHAPE: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    # Wide enough that attention is sharp, and a key that should not be seen is noticed.
    "initializer_range": 0.3,
    # A Gemma with tied random embeddings repeats its last token for ever.
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
TURNS = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "mistral": (MistralConfig, {"sliding_window": WINDOW}),
    "gemma": (GemmaConfig, {"num_key_value_heads": 1}),
    "gemma2": (
        Gemma2Config,
        {
            "sliding_window": WINDOW,
            "layer_types": TURNS,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 4.0,
            "query_pre_attn_scalar": 5,
        },
    ),
    "gemma3": (Gemma3TextConfig, {"sliding_window": WINDOW, "layer_types": TURNS, "query_pre_attn_scalar": 5}),
}


def build(family: str, **changes: Any) -> PreTrainedModel:
    """A model of a family, with the same weights every time whatever `changes` says about its attention."""
    kind, own = FAMILIES[family]
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(kind(**{**SHAPE, **own, **changes}), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Biases and the scales of norms begin as zeros or ones, and a mistake with them would not show.
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2 if "norm" in name else 0.5)
    return model.eval().requires_grad_(False)


def random_adapter(
    model: PreTrainedModel, name: str, *, seed: int = 0, rank: int = 4, alpha: float = 8, std: float = 0.2
) -> Adapter:
    """An adapter of random A and B on all layers of the decoder."""
    draws = torch.Generator().manual_seed(seed)

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draws) * std

    return Adapter(
        name,
        {
            module: LowRank(half(rank, layer.in_features), half(layer.out_features, rank), alpha / rank)
            for module, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and module.rpartition(".")[2] in MODULES
        },
    )


def with_peft(model: PreTrainedModel, adapter: Adapter, alpha: float = 8) -> PeftModel:
    """The model with an adapter of one rank as PEFT holds it."""
    config = LoraConfig(r=adapter.rank, lora_alpha=alpha, target_modules=MODULES)
    wrapped = get_peft_model(model, config, adapter_name=adapter.name)
    assert isinstance(wrapped, PeftModel)
    parameters = dict(wrapped.named_parameters())
    for module, layer in adapter.layers.items():
        for half, values in (("A", layer.a), ("B", layer.b)):
            parameters[f"base_model.model.{module}.lora_{half}.{adapter.name}.weight"].data.copy_(values)
    return wrapped.eval()
