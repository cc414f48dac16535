"""One LoRA adapter, read from PEFT's own format."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from lorafleet.composition.files import CONFIG_FILE, WEIGHTS_FILE
from lorafleet.errors import AdapterError

PREFIX = "base_model.model."
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights that change the base model's weights: such an adapter fits no other base."""


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one linear layer: `scale * b @ a`.

    Attributes:
        a: [rank, inputs].
        b: [outputs, rank].
        scale: alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        """The number of rows of `a`."""
        return self.a.shape[0]

    def to(self, device: torch.device) -> "LowRank":
        """The same on another device; from pinned memory without waiting for it."""
        return LowRank(self.a.to(device, non_blocking=True), self.b.to(device, non_blocking=True), self.scale)

    def first(self, ranks: int) -> "LowRank":
        """At most so many of its ranks; where it has more, in memory of their own, and the rest can go."""
        if self.rank <= ranks:
            return self
        return LowRank(self.a[:ranks].clone(), self.b[:, :ranks].clone(), self.scale)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: the layers it changes, by their module name in the base model."""

    name: str
    layers: Mapping[str, LowRank]

    @property
    def rank(self) -> int:
        """The largest rank of any layer."""
        return max(layer.rank for layer in self.layers.values())

    def pinned(self) -> "Adapter":
        """The same in CPU memory that a GPU reads directly."""
        layers = {
            module: LowRank(layer.a.pin_memory(), layer.b.pin_memory(), layer.scale) for module, layer in self.layers.items()
        }
        return Adapter(self.name, layers)


def load_adapter(folder: Path, name: str | None = None) -> Adapter:
    """Read an adapter that PEFT (or any tool that speaks its format) has saved.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        name: the adapter's name; the folder's where absent.

    Raises:
        AdapterError: a file is missing or damaged, or the adapter is not plain LoRA on linear layers.
    """
    name = name or folder.name
    config = _read_config(folder, name)
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"adapter {name}: cannot read {folder / WEIGHTS_FILE}: {error}") from None
    return Adapter(name, _pair(name, config, tensors))


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"adapter {name}: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise AdapterError(f"adapter {name}: {path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise AdapterError(f"adapter {name}: {path} is not a JSON object")
    if raw.get("peft_type") != "LORA":
        raise AdapterError(f"adapter {name} is of kind {raw.get('peft_type')!r}", "Only LORA adapters can be composed")
    refused = {
        "use_dora": "DoRA",
        "modules_to_save": "full copies of modules",
        "lora_bias": "a bias on B",
        "trainable_token_indices": "trained tokens",
        "target_parameters": "target_parameters",
        "use_qalora": "QALoRA",
        "alora_invocation_tokens": "activated LoRA",
        "arrow_config": "Arrow",
        "kasa_config": "KaSA",
        "monteclora_config": "MonteCLoRA",
        "use_bdlora": "BD-LoRA",
        "layer_replication": "layer_replication",
    }
    found = [what for key, what in refused.items() if raw.get(key)]
    if raw.get("bias", "none") != "none":
        found.append(f"bias={raw['bias']!r}")
    if found:
        raise AdapterError(f"adapter {name} uses {', '.join(found)}", "Only plain LoRA on linear layers can be composed")
    start = raw.get("init_lora_weights")
    if str(start).lower().startswith(CHANGE_THE_BASE):
        raise AdapterError(
            f"adapter {name}: init_lora_weights is {start!r} in {path}, which takes its start out of the base model",
            "Save it with path_initial_model_for_weight_conversion, then it fits the base model as it was",
        )
    patterns = {f"alpha_pattern.{key}": alpha for key, alpha in (raw.get("alpha_pattern") or {}).items()}
    for field, alpha in {"lora_alpha": raw.get("lora_alpha"), **patterns}.items():
        if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            raise AdapterError(f"adapter {name}: {field} is {alpha!r} in {path}", "It must be a number above 0")
    return raw


def _pair(name: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, LowRank]:
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        module, found, half = key.removeprefix(PREFIX).rpartition(".lora_")
        if not found or half not in ("A.weight", "B.weight"):
            raise AdapterError(f"adapter {name} holds {key}", "Only lora_A and lora_B of linear layers can be composed")
        halves.setdefault(module, {})[half[0]] = tensor
    layers = {}
    for module, pair in halves.items():
        shapes = {half: tuple(tensor.shape) for half, tensor in pair.items()}
        if not _belong_together(shapes.get("A", ()), shapes.get("B", ())):
            raise AdapterError(f"adapter {name}: lora_A and lora_B of {module} do not belong together")
        if not all(torch.isfinite(half).all() for half in pair.values()):
            raise AdapterError(f"adapter {name}: {module} holds a value that is not finite")
        layers[module] = LowRank(pair["A"], pair["B"], _scale(config, module, pair["A"].shape[0]))
    if not layers:
        raise AdapterError(f"adapter {name} holds no layer")
    return layers


def _belong_together(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return len(a) == len(b) == 2 and a[0] == b[1] > 0


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
