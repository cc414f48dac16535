"""One LoRA adapter, read from PEFT's own format."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lorafleet.composition.files import WEIGHTS_FILE
from lorafleet.composition.peft_format import read_config, read_layers
from lorafleet.errors import AdapterError


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

    @property
    def largest(self) -> float:
        """The largest absolute value of both; NaN where one of them holds NaN."""
        bounds = [bound.double() for half in (self.a, self.b) for bound in half.aminmax()]
        return float(torch.stack(bounds).abs().max())

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
    config, saved = read_config(folder, name), read_layers(folder, name)
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            layers = {
                module: LowRank(file.get_tensor(one.a), file.get_tensor(one.b), config.scale(module, one.rank))
                for module, one in saved.items()
            }
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"adapter {name}: cannot read {folder / WEIGHTS_FILE}: {error}") from None
    for module, layer in layers.items():
        if not math.isfinite(layer.largest):
            raise AdapterError(f"adapter {name}: {module} holds a value that is not finite")
    return Adapter(name, layers)


def check_number_format(adapter: Adapter, dtype: torch.dtype) -> None:
    """Refuse an adapter whose scaled weights overflow in the number format that they are computed in.

    Raises:
        AdapterError: a layer's values overflow.
    """
    limit = torch.finfo(dtype).max
    for module, layer in adapter.layers.items():
        # As `Pages` writes them: the root of the scale goes to either half.
        root = math.sqrt(layer.scale)
        if not torch.isfinite((torch.tensor(layer.largest).float() * root).to(dtype)):
            named = str(dtype).removeprefix("torch.")
            raise AdapterError(
                f"adapter {adapter.name}: {module} holds {layer.largest * root:.3g} once it is scaled, and {named} ends at "
                f"{limit:.3g}",
                "Set models.dtype to bfloat16 or float32, or train it with a lower lora_alpha or learning rate",
            )
