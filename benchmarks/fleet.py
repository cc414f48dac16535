"""What the benchmarks measure on: a model, real or of random weights, and random adapters on it."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorafleet.composition import Adapter, Composition, LowRank
from lorafleet.composition.files import CONFIG_FILE, WEIGHTS_FILE
from lorafleet.config import Models
from lorafleet.models import load_base_model, load_tokenizer, pick_device, pick_dtype

NEVER = 10**9
"""An end token that no model gives: every answer has its full length."""
WORDS = ["river", "stone", "light", "and", "the", "market", "seven", "walks", "under", "blue", "question", "of", "answer"]
DISTINCT = 64
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that never ends an answer, and its tokenizer.

    Args:
        name: `7b` for the shapes of Llama 2 7B with random weights, `base` for the settings' base model, or a reference.
    """
    settings = Models(dtype=dtype) if name in ("7b", "base") else Models(base=name, dtype=dtype)
    if name == "7b":
        device = pick_device("auto")
        with torch.device(device):
            torch.manual_seed(0)
            model = LlamaForCausalLM._from_config(LlamaConfig(), dtype=pick_dtype(dtype, device))
        model, tokenizer = cast(PreTrainedModel, model.eval().requires_grad_(False)), _bytes_tokenizer()
    else:
        model, tokenizer = load_base_model(settings), load_tokenizer(settings)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = NEVER
    model.generation_config.pad_token_id = 0
    return model, tokenizer


def random_adapters(model: PreTrainedModel, count: int, rank: int) -> list[Adapter]:
    """Adapters on all linear layers of the decoder, in CPU memory, alpha twice the rank.

    Beyond DISTINCT their values come again, under other names: nothing that is measured depends on them.
    """
    torch.manual_seed(1)
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in MODULES
    ]

    def one(number: int) -> Adapter:
        def half(*shape: int) -> torch.Tensor:
            return (torch.randn(shape, device=model.device, dtype=model.dtype) * 0.02).cpu()

        return Adapter(
            f"adapter-{number:02d}",
            {name: LowRank(half(rank, layer.in_features), half(layer.out_features, rank), 2.0) for name, layer in layers},
        )

    distinct = [one(number) for number in range(min(count, DISTINCT))]
    again = range(len(distinct), count)
    return [*distinct, *(replace(distinct[number % DISTINCT], name=f"adapter-{number:02d}") for number in again)]


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """An adapter of `random_adapters` as PEFT's files, in bfloat16."""
    folder.mkdir(parents=True)
    halves = {
        f"base_model.model.{module}.lora_{half}.weight": weight.to(torch.bfloat16).contiguous()
        for module, layer in adapter.layers.items()
        for half, weight in (("A", layer.a), ("B", layer.b))
    }
    save_file(halves, folder / WEIGHTS_FILE)
    rank = adapter.rank
    described = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": MODULES}
    (folder / CONFIG_FILE).write_text(json.dumps(described), encoding="utf-8")


def random_compositions(
    adapters: Sequence[Adapter], count: int, each: int, method: str, draws: random.Random
) -> list[Composition]:
    """Compositions of `each` adapters, no two with the same weights."""
    names = [adapter.name for adapter in adapters]
    return [Composition(method, {name: draws.uniform(0.1, 0.5) for name in draws.sample(names, each)}) for _ in range(count)]


def random_prompts(
    tokenizer: PreTrainedTokenizerBase, count: int, shortest: int, longest: int, draws: random.Random
) -> list[str]:
    """Prompts of random words whose lengths in tokens lie evenly between two bounds."""
    prompts = []
    for place in range(count):
        length = shortest + (longest - shortest) * place // max(count - 1, 1)
        text = " ".join(draws.choice(WORDS) for _ in range(length))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:length]
        prompts.append(str(tokenizer.decode(ids)))
    draws.shuffle(prompts)
    return prompts


def with_peft(model: PreTrainedModel, adapters: Sequence[Adapter]) -> PeftModel:
    """The model with all adapters as PEFT holds them."""
    rank = adapters[0].rank
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=MODULES, init_lora_weights=False)
    wrapped = get_peft_model(model, config, adapter_name=adapters[0].name, autocast_adapter_dtype=False)
    assert isinstance(wrapped, PeftModel)
    for adapter in adapters[1:]:
        wrapped.add_adapter(adapter.name, config, autocast_adapter_dtype=False)
    own = dict(wrapped.named_parameters())
    for adapter in adapters:
        for module, layer in adapter.layers.items():
            for half, values in (("A", layer.a), ("B", layer.b)):
                own[f"base_model.model.{module}.lora_{half}.{adapter.name}.weight"].data.copy_(values)
    return wrapped.eval().requires_grad_(False)


def synchronise() -> None:
    """Wait for the GPU, where there is one: a clock read before would stop too early."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: prompts of any length in tokens can be written down."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(["<pad>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", clean_up_tokenization_spaces=False)
