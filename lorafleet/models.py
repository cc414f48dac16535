"""Base models and encoders: where their files are, and how they are loaded.

A reference is a hub id (`meta-llama/Llama-2-7b-hf`), a folder, a GGUF file, or `package:<python package>/<path>` for models
that travel in a Python package. A GGUF file is unpacked once into a cache (LORAFLEET_CACHE, else ~/.cache/lorafleet):
reading its metadata takes transformers 15 s, and every worker and replica loads the model.

Torch and transformers take seconds to import, and are imported where a model is loaded: most processes only ask for names.
"""

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lorafleet.config import Models
from lorafleet.errors import ModelError
from lorafleet.home import expanded
from lorafleet.paths import PACKAGE
from lorafleet.storage import folder_in_one_step, readable

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are.

    Attributes:
        location: a folder, or a hub id.
        gguf_file: the file inside the folder, where the weights are GGUF.
    """

    location: str
    gguf_file: str | None = None

    @property
    def local(self) -> bool:
        """Whether the files are on this machine."""
        return Path(self.location).is_dir()


def locate(reference: str) -> ModelSource:
    """Find a model's files.

    Raises:
        ModelError: the package is not installed or has no such file, or this user may not look there.
    """
    if reference.startswith(PACKAGE):
        path = _in_package(reference)
    else:
        path = _expanded(reference, "the model", "give its whole path")
    try:
        if path.suffix == ".gguf" and path.is_file():
            return ModelSource(str(path.parent), path.name)
        if path.is_dir():
            return ModelSource(str(path))
    except OSError as error:
        raise ModelError(f"cannot read the model {reference!r}: {error.strerror}") from None
    if reference.startswith(PACKAGE):
        raise ModelError(f"no file {path.name!r} for the model {reference!r}", "Check the path behind package:")
    if reference.startswith((".", "/", "~")) or reference.count("/") > 1:
        raise ModelError(f"no folder for the model {reference!r}", "Give a hub id, an existing folder, or package:NAME/PATH")
    return ModelSource(reference)


def _in_package(reference: str) -> Path:
    name, _, inside = reference.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the package of the model {reference!r} is not installed", f"pip install {name.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0]) / inside


def unpacked(source: ModelSource) -> str:
    """The folder or hub id that transformers loads quickly: for a GGUF file, what it was unpacked to.

    Raises:
        ModelError: the file is damaged, or the cache cannot be written.
    """
    if source.gguf_file is None:
        return source.location
    file = Path(source.location) / source.gguf_file
    folder = _cache() / f"{short_name(source.gguf_file)}-{_digest([file])}"
    try:
        if not (folder / "config.json").is_file():
            with folder_in_one_step(folder) as beside:
                _unpack(source, beside)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot unpack {file} into {folder}: {_first_line(error)}") from None
    return str(folder)


def _cache() -> Path:
    """The folder of unpacked models.

    Raises:
        ModelError: it is relative, and other processes would have others; or this user has no home folder.
    """
    folder = os.environ.get("LORAFLEET_CACHE") or "~/.cache/lorafleet"
    path = _expanded(folder, "unpacked models", "LORAFLEET_CACHE to a folder")
    if not path.is_absolute():
        raise ModelError(f"LORAFLEET_CACHE = {folder} is relative", "Give an absolute folder")
    return path


def _expanded(path: str, what: str, hint: str) -> Path:
    try:
        return expanded(path)
    except RuntimeError:
        raise ModelError(f"this user has no home folder, and {what} would lie in {path}", f"Set HOME, or {hint}") from None


def _unpack(source: ModelSource, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = {"gguf_file": source.gguf_file}
    weights = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(source.location, dtype=torch.float32, quantization_config=weights, **gguf)
    # What is saved is plain float32; a quantisation left in the configuration would be looked for again.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.location, **gguf).save_pretrained(folder)


@cache
def fingerprint(reference: str, revision: str | None = None) -> str:
    """What identifies the weights: a digest of the files that are here, or the hub id with its revision."""
    source = locate(reference)
    if not source.local:
        return f"{source.location}@{revision or 'main'}"
    folder = Path(source.location)
    weights = [folder / source.gguf_file] if source.gguf_file else sorted(folder.rglob("*.safetensors"))
    return _digest(weights or sorted(folder.rglob("*.bin")))


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as opened:
                while piece := opened.read(1 << 20):
                    digest.update(piece)
        except OSError as error:
            raise ModelError(f"cannot read {file}: {error.strerror}", "Let this user read the model's files") from None
    return digest.hexdigest()[:16]


def _readable(location: str) -> str:
    """A model's folder whose files this user may read; a hub id as it is.

    Raises:
        OSError: one cannot be read. The libraries call it missing.
    """
    folder = Path(location)
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.is_file():
            readable(file)
    return location


def short_name(reference: str) -> str:
    """The name of a base model as the folders of its adapters carry it, e.g. `smollm2-135m-instruct`."""
    name = reference.rstrip("/").rsplit("/", 1)[-1]
    return name.removesuffix(".gguf").split(".Q")[0].lower()


def pick_device(device: str) -> "torch.device":
    """The device a setting stands for; `auto` is the GPU where there is one."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("models.device is cuda, and torch sees no GPU", "Set models.device to auto or cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def pick_dtype(dtype: str, device: "torch.device") -> "torch.dtype":
    """The number format a setting stands for; `auto` is bfloat16 where the hardware multiplies it faster than float32."""
    import torch

    if dtype != "auto":
        named: torch.dtype = getattr(torch, dtype)
        return named
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if _cpu_prefers_bfloat16() else torch.float32


def _cpu_prefers_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32 by torch 2.13.

    With AMX it does. With AVX512-BF16 alone an AMD EPYC (Zen 5) is 4.5 times as fast in it, and an Intel Xeon 0.6 times.
    To time some products here would tell little: on a busy machine they take anything.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        return True
    # Older versions of torch do not tell.
    told: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.cpu._is_avx512_bf16_supported() and str(told.get("cpu_name")).startswith("AMD")


def pick_encoder_dtype(dtype: str, device: "torch.device") -> "torch.dtype":
    """The encoder's number format; `auto` is bfloat16 on CPUs that multiply it: packed, it takes them half the time.

    A text's vector then has a cosine of 0.9999 with the one in float32.
    """
    import torch

    fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if dtype == "bfloat16" or (dtype == "auto" and fast) else torch.float32


def load_tokenizer(settings: Models) -> "PreTrainedTokenizerBase":
    """The base model's tokenizer, with a pad token."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    source = locate(settings.base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(_readable(unpacked(source)), revision=settings.base_revision or "main")
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the tokenizer of {settings.base!r}: {_first_line(error)}") from None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
    return tokenizer


def load_base_model(settings: Models, dtype: str | None = None) -> "PreTrainedModel":
    """The base model, frozen, in evaluation mode, on its device.

    Args:
        dtype: overrides `settings.dtype` (training has a setting of its own).

    Raises:
        ModelError: the files are not there, or are not a causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    source = locate(settings.base)
    device = pick_device(settings.device)
    number_format = pick_dtype(dtype or settings.dtype, device)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            _readable(unpacked(source)), revision=settings.base_revision or "main", dtype=number_format
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the base model {settings.base!r}: {_first_line(error)}") from None
    torch.nn.Module.to(model.requires_grad_(False), device)
    return cast("PreTrainedModel", model.train(False))


def load_encoder(settings: Models) -> "SentenceTransformer":
    """The sentence encoder.

    Raises:
        ModelError: it is not there, or is not a sentence-transformers model.
    """
    from sentence_transformers import SentenceTransformer

    source = locate(settings.encoder)
    device = pick_device(settings.device)
    try:
        return SentenceTransformer(
            _readable(source.location), device=str(device), revision=settings.encoder_revision, local_files_only=source.local
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the encoder {settings.encoder!r}: {_first_line(error)}") from None


def check_readable(settings: Models) -> None:
    """Refuse a base model that cannot be read, before long work begins."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(_readable(unpacked(locate(settings.base))), revision=settings.base_revision or "main")
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the base model {settings.base!r}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
