"""lorafleet doctor."""

import importlib.metadata
import os
import platform
import shlex
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import typer

from lorafleet.cli.options import ConfigOption, JsonOption, SetOption, StateOption, settings_from
from lorafleet.cli.output import print_json
from lorafleet.cli.service import run_folder
from lorafleet.composition.files import WEIGHTS_FILE
from lorafleet.config import Settings
from lorafleet.errors import LoRAFleetError
from lorafleet.ray_token import check_private, token_file
from lorafleet.storage import check_state_writable, file_mode

PACKAGES = ("ray", "torch", "transformers", "peft", "accelerate", "datasets", "sentence-transformers", "chromadb")
FREE_DISK_GIB = 5
FREE_MEMORY_GIB = 4


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, whether it is fine, what was found, and the mend where it is not."""

    check: str
    fine: bool
    found: str
    mend: str = ""


def doctor(
    config: ConfigOption = None,
    overrides: SetOption = [],
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check versions, models, Chroma, Ray, GPU, memory and disk, and say how to mend each fault."""
    findings = list(_examine(settings_from(config, overrides, state)))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            typer.echo(f"{'ok   ' if finding.fine else 'FAULT'}  {finding.check:<12}  {finding.found}")
            if finding.mend:
                typer.echo(f"{'':21}{finding.mend}")
    if not all(finding.fine for finding in findings):
        raise typer.Exit(1)


def _examine(settings: Settings) -> Iterator[Finding]:
    yield Finding("python", True, platform.python_version())
    yield from (_package(name) for name in PACKAGES)
    for check, examine in EXAMINED.items():
        yield _finding(check, examine, settings)


def _finding(check: str, examine: Callable[[Settings], Finding], settings: Settings) -> Finding:
    try:
        return examine(settings)
    except LoRAFleetError as error:
        return Finding(check, False, error.problem, error.mend)
    except OSError as error:
        return Finding(check, False, f"cannot read {error.filename}: {error.strerror}", "Let this user read it")


def _package(name: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", f"pip install {name}")


def _base_model(settings: Settings) -> Finding:
    from lorafleet.models import check_readable

    check_readable(settings.models)
    return Finding("base model", True, settings.models.base)


def _encoder(settings: Settings) -> Finding:
    from lorafleet.models import locate

    source = locate(settings.models.encoder)
    return Finding("encoder", True, settings.models.encoder if source.local else f"{source.location}, from the hub")


def _device(settings: Settings) -> Finding:
    import torch

    from lorafleet.models import pick_device, pick_dtype

    device = pick_device(settings.models.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Finding("device", True, f"{name}, {str(pick_dtype(settings.models.dtype, device)).removeprefix('torch.')}")


def _memory(_: Settings) -> Finding:
    import psutil

    free = psutil.virtual_memory().available / 2**30
    mend = "" if free >= FREE_MEMORY_GIB else f"Free some: the demo wants {FREE_MEMORY_GIB} GiB"
    return Finding("memory", not mend, f"{free:.1f} GiB free", mend)


def _disk(settings: Settings) -> Finding:
    folder = next(parent for parent in (settings.state, *settings.state.parents) if parent.exists())
    free = shutil.disk_usage(folder).free / 2**30
    mend = "" if free >= FREE_DISK_GIB else f"Free {FREE_DISK_GIB} GiB, or set --state to another disk"
    return Finding("disk", not mend, f"{free:.1f} GiB free at {settings.state}", mend)


def _state(settings: Settings) -> Finding:
    if not settings.state.exists():
        return Finding("state", True, f"{settings.state} will be made")
    check_state_writable(settings.state)
    return Finding("state", True, f"{settings.state} can be written")


def _permissions(settings: Settings) -> Finding:
    """Check that nobody else can change the state or read the keys, and that a group with the state can read the weights."""
    faults = {
        "others can change {}": [
            path
            for path in (settings.state, settings.adapters, settings.chroma, run_folder(settings))
            if file_mode(path) & stat.S_IWOTH
        ],
        "others can read or change the keys in {}": [
            path for path in (settings.keys_file,) if file_mode(path) & (stat.S_IRWXO | stat.S_IWGRP)
        ],
        "the group cannot read {}": [
            path
            for path in settings.adapters.glob(f"*/{WEIGHTS_FILE}")
            if file_mode(path.parent) & stat.S_IRGRP and not file_mode(path) & stat.S_IRGRP
        ],
    }
    commands = ("chmod o-w", "chmod 600", "chmod g+r")
    for (problem, paths), command in zip(faults.items(), commands, strict=True):
        if paths:
            named = " ".join(shlex.quote(str(path)) for path in paths)
            return Finding("permissions", False, problem.format(named), f"Run: {command} {named}")
    return Finding("permissions", True, "nobody else changes the state or reads the keys")


def _ray_token(_: Settings) -> Finding:
    file = token_file()
    check_private()
    if file is None:
        return Finding("ray token", True, "in RAY_AUTH_TOKEN")
    there = os.path.lexists(file)
    return Finding("ray token", True, str(file) if there else "none yet", "" if there else "lorafleet up makes one")


def _chroma(settings: Settings) -> Finding:
    from lorafleet.retrieval import open_index, server
    from lorafleet.tasks import prompt_version

    if not server.answers(settings.index):
        return Finding("chroma", True, f"no server at {settings.index.url}", "lorafleet up starts one")
    rows = sum(open_index(settings, prompt_version()).counts().values())
    return Finding("chroma", True, f"{rows} rows at {settings.index.url}")


def _endpoint(settings: Settings) -> Finding:
    from lorafleet.cli.endpoint import endpoint_url
    from lorafleet.cli.service import endpoint_ready

    if endpoint_ready(settings):
        return Finding("endpoint", True, endpoint_url(settings))
    return Finding("endpoint", True, f"not up at {endpoint_url(settings)}", "lorafleet up starts it")


def _adapters(settings: Settings) -> Finding:
    from lorafleet.adapters import stored_adapters

    count = len(stored_adapters(settings).adapters)
    return Finding("adapters", True, f"{count} in {settings.adapters}", "" if count else "lorafleet train makes them")


EXAMINED = {
    "base model": _base_model,
    "encoder": _encoder,
    "device": _device,
    "memory": _memory,
    "disk": _disk,
    "state": _state,
    "permissions": _permissions,
    "ray token": _ray_token,
    "chroma": _chroma,
    "endpoint": _endpoint,
    "adapters": _adapters,
}
