"""What several rooms' tests share: a tiny random Llama, and LoRA adapters on it in PEFT's format."""

import os
import secrets

# The clusters of the tests have a token of their own, and write none into the home folder.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Before PEFT, which brings in Triton.
from collections.abc import Callable, Iterator
from pathlib import Path

import interpreted  # noqa: F401
import pytest
import torch
from hypothesis import settings
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

# The same cases every time; others by --hypothesis-profile default.
settings.register_profile("steady", derandomize=True)
settings.load_profile("steady")

# The models here are tiny: threads would only wait for each other.
torch.set_num_threads(1)

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_llama(vocabulary: int = 512) -> LlamaForCausalLM:
    """A Llama of two layers with random weights, the same every time, in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def every_core() -> Iterator[None]:
    """All threads, for a test with a real model in this process."""
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Save a LoRA adapter with random A and B for `tiny_llama`, and give its folder."""

    def make(name: str, rank: int = 4, alpha: float = 8, seed: int = 0, **config) -> Path:
        settings = {"target_modules": MODULES, **config}
        model = get_peft_model(tiny_llama(), LoraConfig(r=rank, lora_alpha=alpha, **settings), adapter_name=name)
        assert isinstance(model, PeftModel)
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.3)
        model.save_pretrained(tmp_path / "adapters")
        return tmp_path / "adapters" / name

    return make
