"""Base models in 4 bits (NF4, QLoRA: arXiv 2305.14314), for training where memory is short; adapters stay as they are."""

import importlib.util

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from lorafleet.config import Settings
from lorafleet.errors import ModelError, TrainingError
from lorafleet.models import locate, pick_device, unpacked

MEND = "Set training.quantization to none"


def check_quantization(settings: Settings) -> None:
    """Refuse 4 bits where they cannot be computed with.

    Raises:
        TrainingError: there is no GPU, or no bitsandbytes.
    """
    if settings.training.quantization == "none":
        return
    if pick_device(settings.models.device).type != "cuda":
        raise TrainingError("training.quantization is 4bit, which needs CUDA", MEND)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise TrainingError(
            "training.quantization is 4bit, and bitsandbytes is not installed",
            f"pip install lorafleet[quantization], or {MEND.lower()}",
        )


def load_in_4_bits(settings: Settings, dtype: torch.dtype) -> PreTrainedModel:
    """The base model, frozen, in evaluation mode, its linear layers in 4 bits; they compute in `dtype`.

    Raises:
        ModelError: the files are not there, or are not a causal language model.
    """
    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            unpacked(locate(settings.models.base)),
            revision=settings.models.base_revision or "main",
            dtype=dtype,
            quantization_config=config,
            device_map={"": torch.cuda.current_device()},
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load the base model {settings.models.base!r} in 4 bits: {' '.join(str(error).split())}"
        ) from None
    frozen: PreTrainedModel = model.requires_grad_(False).train(False)
    return frozen
