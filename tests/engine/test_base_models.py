"""Models that the engine would compute wrongly are refused; a rotation that depends on the pass's texts is held."""

import pytest
import torch
from engine.families import NEVER, SHAPE
from tiny_language_model import tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
)

from lorafleet.engine import GenerationRequest
from lorafleet.engine.base_models import hold_rotation
from lorafleet.errors import ModelError
from lorafleet.prompts import encode_prompt

SHORT = 64
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.2] * 4, "long_factor": [5.0] * 4}
BY_LAYER = {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": DYNAMIC}
ADAPTING = {
    "phi3": (Phi3Config, {"original_max_position_embeddings": SHORT, "rope_parameters": LONGROPE}),
    "llama": (LlamaConfig, {"max_position_embeddings": SHORT, "rope_parameters": DYNAMIC}),
    "gemma3": (
        Gemma3TextConfig,
        {
            "max_position_embeddings": SHORT,
            "rope_parameters": BY_LAYER,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
}


def model_of(kind: type[PreTrainedConfig], **own) -> PreTrainedModel:
    torch.manual_seed(3)
    config = kind(**{**SHAPE, "eos_token_id": NEVER, "pad_token_id": 0, **own})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("kind", "own", "problem"),
    [
        (Lfm2Config, {"layer_types": ["conv", "full_attention", "conv"]}, "a lfm2 with layers of conv"),
        (LlamaConfig, {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
        (GptOssConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}, "a gpt_oss with layers of attention with sinks"),
    ],
)
def test_layers_that_cannot_be_computed_are_refused(make_engine, kind, own, problem):
    with pytest.raises(ModelError, match=f"models.base is .*{problem}.* full_attention and sliding_attention alone"):
        make_engine(model_of(kind, **own))


@pytest.mark.parametrize("family", ADAPTING)
def test_texts_that_would_change_the_rotation_of_others_are_refused(make_engine, family):
    kind, own = ADAPTING[family]
    with pytest.raises(ModelError, match=f"generation.longest is {SHORT + 1}, .* Lower generation.longest to {SHORT}"):
        make_engine(model_of(kind, **own), longest=SHORT + 1)


@pytest.mark.parametrize("family", ADAPTING)
def test_a_rotation_for_short_texts_stays_whatever_the_pass(make_engine, family):
    kind, own = ADAPTING[family]
    reference, model = model_of(kind, **own), model_of(kind, **own)
    engine = make_engine(model, longest=SHORT)
    prompts = ["short", "x" * (SHORT - 12)]
    wanted = []
    for prompt in prompts:
        tokens = torch.tensor([encode_prompt(tiny_tokenizer(), prompt, SHORT)])
        whole = reference.generate(tokens, max_new_tokens=10, do_sample=False, attention_mask=torch.ones_like(tokens))
        wanted.append(tuple(whole[0, tokens.shape[1] :].tolist()))
    asked = [GenerationRequest(prompt, max_tokens=10) for prompt in prompts]
    assert [answer.tokens for answer in engine.generate(asked)] == wanted


@pytest.mark.parametrize("family", ADAPTING)
def test_a_rotation_that_is_held_does_not_follow_the_positions(family):
    """To look at them would also keep a pass from being captured."""
    kind, own = ADAPTING[family]
    model = model_of(kind, **own)
    hold_rotation(model, SHORT)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name}
    model(torch.ones(1, 2 * SHORT, dtype=torch.int64))
    assert before
    assert all(torch.equal(model.get_buffer(name), buffer) for name, buffer in before.items())
