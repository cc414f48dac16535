"""An adapter's folder as PEFT saves it: the configuration and the shapes, checked before a tensor is read.

The folder may come from anyone: sizes are bounded, and every fault is an AdapterError.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open

from lorafleet.composition.files import CONFIG_BYTES, CONFIG_FILE, HEADER_BYTES, WEIGHTS_FILE
from lorafleet.composition.patterns import PatternError, Patterns
from lorafleet.errors import AdapterError, shown, shown_name

PREFIX = "base_model.model."
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights that change the base model's weights: such an adapter fits no other base."""
REFUSED = {
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
FORMATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
OTHER_FORMATS = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
    "C64": "complex64",
    "BOOL": "bool",
    **{f"{sign}{bits}": f"{name}{bits}" for sign, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}
LONGEST_NAME = 512
KEY = re.compile(r"[\w.-]+", re.ASCII)
STATE_DICT_KEY = re.compile(r".*\.lora_[AB]\.[^.]+\.weight")
OUTSIDE = {"lm_head": "the output head", "embed_tokens": "the embeddings"}
RESAVE = "Save it with PEFT's save_pretrained"
HINTS = {
    "lora_alpha": "It must be a number above 0",
    "alpha_pattern": "It must be an object of module names, each with a number above 0",
    "rank_pattern": "It must be an object of module names, each with a whole number above 0",
    "use_rslora": "It must be true or false",
    "base_model_name_or_path": "It must be a name or a path, of at most 4096 characters",
}

Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rank = Annotated[int, Field(gt=0)]


class AdapterConfig(BaseModel):
    """The fields of adapter_config.json that plain LoRA needs."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    lora_alpha: Alpha
    alpha_pattern: dict[str, Alpha] | None = None
    rank_pattern: dict[str, Rank] | None = None
    use_rslora: bool | None = None
    target_modules: Any = None
    base_model_name_or_path: Annotated[str, Field(max_length=4096)] | None = None

    @cached_property
    def patterns(self) -> Patterns:
        """The keys of alpha_pattern."""
        return Patterns(self.alpha_pattern or ())

    def scale(self, module: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank), of a module."""
        key = self.patterns.key_for(module)
        alpha = self.lora_alpha if key is None or self.alpha_pattern is None else self.alpha_pattern[key]
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


@dataclass(frozen=True)
class SavedLayer:
    """The two tensors of one layer in adapter_model.safetensors.

    Attributes:
        a, b: their keys.
        rank: rows of A, and columns of B.
    """

    a: str
    b: str
    rank: int


def read_config(folder: Path, name: str) -> AdapterConfig:
    """Read adapter_config.json.

    Raises:
        AdapterError: it cannot be read, or does not describe plain LoRA.
    """
    path = folder / CONFIG_FILE
    raw = _read_object(path, name)
    if raw.get("peft_type") != "LORA":
        raise AdapterError(f"adapter {name} is of kind {shown(raw.get('peft_type'))}", "Only LORA adapters can be composed")
    found = [what for key, what in REFUSED.items() if raw.get(key)]
    if raw.get("bias", "none") != "none":
        found.append(f"bias={shown(raw['bias'])}")
    if found:
        raise AdapterError(f"adapter {name} uses {', '.join(found)}", "Only plain LoRA on linear layers can be composed")
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGE_THE_BASE):
        raise AdapterError(
            f"adapter {name}: init_lora_weights is {shown(start)} in {path}, which takes its start out of the base model",
            "Save it with path_initial_model_for_weight_conversion, then it fits the base model as it was",
        )
    try:
        config = AdapterConfig.model_validate({"lora_alpha": None} | raw)
    except ValidationError as error:
        field, *keys = map(str, error.errors()[0]["loc"])
        value, named = raw.get(field), field
        for key in keys[:1]:
            value, named = raw[field][key], f"{field}.{shown_name(key)}"
        raise AdapterError(f"adapter {name}: {named} is {shown(value)} in {path}", HINTS[field]) from None
    for field in ("alpha_pattern", "rank_pattern"):
        _check_patterns(getattr(config, field) or {}, field, name, path)
    return config


def _check_patterns(found: Mapping[str, object], field: str, name: str, path: Path) -> None:
    hint = "Use names of modules, or patterns that RE2 takes (docs/pool.md)"
    for key in found:
        try:
            Patterns([key])
        except PatternError as error:
            raise AdapterError(f"adapter {name}: {field} has the key {shown(key)} in {path}: {error}", hint) from None
    try:
        Patterns(found)
    except PatternError as error:
        raise AdapterError(f"adapter {name}: {field} in {path}: {error}", hint) from None


def _read_object(path: Path, name: str) -> dict[str, Any]:
    try:
        _check_plain(path)
        with path.open("rb") as file:
            text = file.read(CONFIG_BYTES + 1)
    except OSError as error:
        raise AdapterError(f"adapter {name}: cannot read {path}: {error.strerror}") from None
    if len(text) > CONFIG_BYTES:
        raise AdapterError(f"adapter {name}: {path} has more than {CONFIG_BYTES} bytes", RESAVE)
    try:
        # Unlike json it raises ValueError for deep nesting, half surrogates and endless digits, too.
        raw = from_json(text)
    except ValueError as error:
        raise AdapterError(f"adapter {name}: {path} is not JSON: {error}", f"{RESAVE}, in UTF-8") from None
    if not isinstance(raw, dict):
        raise AdapterError(f"adapter {name}: {path} is not a JSON object", RESAVE)
    return raw


def read_layers(folder: Path, name: str) -> dict[str, SavedLayer]:
    """Read the header of adapter_model.safetensors: the layers, by their module name in the base model.

    Raises:
        AdapterError: it cannot be read, or holds anything but the A and B of linear layers in a known number format.
    """
    path = folder / WEIGHTS_FILE
    try:
        _check_plain(path)
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        # The library's own limit is 100 MB: gigabytes as Python objects.
        if HEADER_BYTES < header < path.stat().st_size:
            raise AdapterError(f"adapter {name}: cannot read {path}: its header has more than {HEADER_BYTES} bytes", RESAVE)
        with safe_open(path, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            found = {key: (str(one.get_dtype()), tuple(one.get_shape())) for key, one in slices.items()}
    except OSError as error:
        raise AdapterError(f"adapter {name}: cannot read {path}: {error.strerror or shown_name(str(error))}") from None
    except SafetensorError as error:
        raise AdapterError(f"adapter {name}: cannot read {path}: {shown_name(str(error))}", RESAVE) from None
    halves: dict[str, dict[str, str]] = {}
    for key, (number_format, shape) in found.items():
        module, half = _module_and_half(key, name)
        if number_format not in FORMATS:
            raise AdapterError(
                f"adapter {name}: {key} is {OTHER_FORMATS.get(number_format, number_format)}. "
                f"Allowed: {', '.join(FORMATS.values())}",
                "Save it in one of these",
            )
        if 0 in shape:
            raise AdapterError(
                f"adapter {name}: {key} is empty, its shape is {shown(shape)}",
                "Under DeepSpeed ZeRO-3 gather the weights before saving (stage3_gather_16bit_weights_on_model_save)",
            )
        if half in halves.setdefault(module, {}):
            raise AdapterError(f"adapter {name} holds lora_{half} of {module} twice", RESAVE)
        halves[module][half] = key
    layers = {}
    for module, pair in halves.items():
        a, b = (found[pair[half]][1] if half in pair else () for half in "AB")
        if not (len(a) == len(b) == 2 and a[0] == b[1]):
            shapes = f"their shapes are {shown(a)} and {shown(b)}" if a and b else f"lora_{'B' if a else 'A'} is missing"
            raise AdapterError(f"adapter {name}: lora_A and lora_B of {module} do not belong together: {shapes}", RESAVE)
        layers[module] = SavedLayer(pair["A"], pair["B"], a[0])
    if not layers:
        raise AdapterError(f"adapter {name} holds no layer", RESAVE)
    return layers


def _module_and_half(key: str, name: str) -> tuple[str, str]:
    if len(key) > LONGEST_NAME or not KEY.fullmatch(key):
        raise AdapterError(f"adapter {name} holds a tensor named {shown(key)}, which is no layer's name", RESAVE)
    for outside in key.split("."):
        if outside in OUTSIDE:
            raise AdapterError(
                f"adapter {name} holds {key}: {OUTSIDE[outside]} of the base model cannot be changed by adapters here",
                f"Train it with target_modules that leave {outside} out",
            )
    module, found, half = key.removeprefix(PREFIX).rpartition(".lora_")
    if not found or half not in ("A.weight", "B.weight"):
        if STATE_DICT_KEY.fullmatch(key):
            raise AdapterError(f"adapter {name} holds {key}, a key of the model's state_dict", RESAVE)
        raise AdapterError(f"adapter {name} holds {key}", "Only lora_A and lora_B of linear layers can be composed")
    return module, half[0]


def _check_plain(path: Path) -> None:
    """Refuse a pipe, whose reader would wait, and a device."""
    if path.exists() and not path.is_file():
        raise OSError(0, "it is not a plain file")
