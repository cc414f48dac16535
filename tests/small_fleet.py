"""A fleet on a tiny random model with a real index: no training, and replicas that start in seconds."""

import socket
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_language_model import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from lorafleet.config import Settings, load_settings
from lorafleet.retrieval import Encoder, Entry, open_for_writing, row_identifiers
from lorafleet.tasks import prompt_version

ROWS = {
    "weather": ["Will it rain tomorrow?", "How cold is the winter in Oslo?", "A storm comes up from the west."],
    "cooking": ["How long does an egg boil?", "Knead the dough for ten minutes.", "Which spice is in a curry?"],
}


def small_settings(folder: Path, index_port: int, **serving: object) -> Settings:
    """Settings of a fleet whose base model is made here."""
    base = folder / "base"
    if not base.exists():
        tiny_model().save_pretrained(base)
        tiny_tokenizer(adds_bos=False).save_pretrained(base)
    state = folder / "state"
    (state / "incoming").mkdir(parents=True, exist_ok=True)
    return load_settings(
        state=state,
        models={"base": str(base), "device": "cpu", "dtype": "float32"},
        index={"url": f"http://127.0.0.1:{index_port}", "patience_seconds": 3},
        generation={"max_new_tokens": 256, "max_tokens": 8, "rows": 8, "longest": 1024},
        serving=serving,
    )


def fill(settings: Settings) -> None:
    """An adapter and a few rows for every task of ROWS, and nothing else in the index."""
    encoder = Encoder(settings.models)
    open_for_writing(settings, prompt_version()).drop()
    index = open_for_writing(settings, prompt_version())
    for number, (task, texts) in enumerate(ROWS.items()):
        save_adapter(settings.adapters / task, seed=number)
        entries = [Entry(name, task, text) for name, text in zip(row_identifiers(task, texts), texts, strict=True)]
        index.write(entries, encoder.encode(texts, 8))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def save_adapter(
    folder: Path, seed: int = 0, rank: int = 4, model: PreTrainedModel | None = None, safe: bool = True, base: str = ""
) -> Path:
    """A random LoRA adapter in PEFT's format, for the tiny model or another one."""
    config = LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = get_peft_model(model or tiny_model(), config)
    assert isinstance(adapted, PeftModel)
    adapted.peft_config["default"].base_model_name_or_path = base
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5, generator=draws)
    adapted.save_pretrained(folder, safe_serialization=safe)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def footprint(settings: Settings) -> dict[str, object]:
    """What lies on disk, byte for byte, and what is in the index."""
    paths = [path for path in settings.adapters.rglob("*") if path.is_file() and path.suffix != ".lock"]
    files = {str(path.relative_to(settings.state)): path.read_bytes() for path in paths}
    return {"files": files, "rows": open_for_writing(settings, prompt_version()).counts()}
