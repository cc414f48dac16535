"""What puts LoRA layers into a base model: PEFT, or unsloth's faster kernels where there is CUDA."""

import importlib.util
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from lorafleet.config import Settings, Training
from lorafleet.errors import TrainingError
from lorafleet.models import load_base_model, load_tokenizer, locate, pick_device, pick_dtype, unpacked
from lorafleet.training.quantization import check_quantization, load_in_4_bits

# What unsloth 2026.10 puts its own layers into.
UNSLOTH_KINDS = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "cohere", "granite"}


class Backend(Protocol):
    """Loads a base model, and wraps it with LoRA layers."""

    @property
    def name(self) -> str:
        """The value of `training.backend` that stands for it."""

    @property
    def reason(self) -> str:
        """Why it was chosen."""

    @property
    def own_kernels(self) -> bool:
        """Whether it replaces the layers' code by its own, which takes weights in float32 and attends in its own way."""

    def load(self, settings: Settings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The base model for training, frozen, and its tokenizer."""

    def attach(self, model: PreTrainedModel, training: Training) -> PeftModel:
        """The model with fresh LoRA layers, their weights in float32."""


@dataclass(frozen=True)
class PeftBackend:
    """PEFT, on any device."""

    reason: str
    name: str = "peft"
    own_kernels: bool = False

    def load(self, settings: Settings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The base model in the format of `training.dtype`; float32 where `auto` would be float16, which needs scaling."""
        dtype = pick_dtype(settings.training.dtype, pick_device(settings.models.device))
        dtype = torch.float32 if dtype == torch.float16 else dtype
        if settings.training.quantization == "4bit":
            return load_in_4_bits(settings, dtype), load_tokenizer(settings.models)
        return load_base_model(settings.models, str(dtype).removeprefix("torch.")), load_tokenizer(settings.models)

    def attach(self, model: PreTrainedModel, training: Training) -> PeftModel:
        """The model with LoRA layers on `training.modules`.

        Raises:
            TrainingError: the model has no modules of those names.
        """
        config = LoraConfig(
            r=training.rank,
            lora_alpha=training.alpha,  # type: ignore[arg-type]  # PEFT takes fractions, too.
            lora_dropout=training.dropout,
            target_modules=training.modules,
            bias="none",
            task_type="CAUSAL_LM",
        )
        try:
            wrapped = get_peft_model(model, config, autocast_adapter_dtype=True)
        except ValueError as error:
            raise TrainingError(
                f"training.modules = {training.modules} does not fit the base model: {error}",
                "Name linear layers of that model",
            ) from None
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return wrapped


@dataclass(frozen=True)
class UnslothBackend:
    """unsloth, on CUDA devices, for models that it knows."""

    reason: str
    name: str = "unsloth"
    own_kernels: bool = True

    def load(self, settings: Settings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The base model with unsloth's kernels."""
        from unsloth import FastLanguageModel

        device = pick_device(settings.models.device)
        folder = unpacked(locate(settings.models.base))
        config = AutoConfig.from_pretrained(folder, revision=settings.models.base_revision or "main")
        longest = getattr(config, "max_position_embeddings", 0)
        model, _ = FastLanguageModel.from_pretrained(
            folder,
            revision=settings.models.base_revision,
            # Longer rows it would cut without a word, their answers first.
            max_seq_length=max(settings.training.max_tokens, longest),
            dtype=pick_dtype(settings.training.dtype, device),
            load_in_4bit=settings.training.quantization == "4bit",
            # Not another repository's weights for those that are asked for.
            use_exact_model_name=True,
            use_gradient_checkpointing="unsloth" if settings.training.gradient_checkpointing else False,
            device_map={"": torch.cuda.current_device()},
        )
        return model, load_tokenizer(settings.models)

    def attach(self, model: PreTrainedModel, training: Training) -> PeftModel:
        """The model with LoRA layers on `training.modules`."""
        from unsloth import FastLanguageModel

        checkpointing: Any = "unsloth" if training.gradient_checkpointing else False
        wrapped: PeftModel = FastLanguageModel.get_peft_model(
            model,
            r=training.rank,
            lora_alpha=training.alpha,
            lora_dropout=training.dropout,
            target_modules=training.modules,
            bias="none",
            use_gradient_checkpointing=checkpointing,
            random_state=training.seed,
        )
        return wrapped


def choose_backend(settings: Settings) -> Backend:
    """The backend that `training.backend` stands for; `auto` is unsloth where it can work, else PEFT.

    Raises:
        TrainingError: unsloth, or a base in 4 bits, is asked for and cannot work here.
    """
    check_quantization(settings)
    if settings.training.backend == "peft":
        return PeftBackend("training.backend says so")
    obstacle = _unsloth_obstacle(settings)
    if settings.training.backend == "auto":
        return PeftBackend(obstacle) if obstacle else UnslothBackend("unsloth and CUDA are there")
    if obstacle:
        raise TrainingError(f"training.backend is unsloth, but {obstacle}", "Set training.backend to auto or peft")
    return UnslothBackend("training.backend says so")


def _unsloth_obstacle(settings: Settings) -> str:
    """Why unsloth cannot train the base model here; empty where it can."""
    if pick_device(settings.models.device).type != "cuda":
        return "unsloth needs CUDA"
    if importlib.util.find_spec("unsloth") is None:
        return "unsloth is not installed"
    source = locate(settings.models.base)
    kind = AutoConfig.from_pretrained(unpacked(source), revision=settings.models.base_revision or "main").model_type
    if kind not in UNSLOTH_KINDS:
        return f"unsloth does not know models of the kind {kind}"
    if pick_dtype(settings.training.dtype, pick_device(settings.models.device)) == torch.float16:
        return "this GPU has no bfloat16, and float16 needs scaled gradients"
    try:
        importlib.import_module("unsloth")
    except Exception as error:
        return f"unsloth cannot be imported: {type(error).__name__}: {error}"
    return ""
