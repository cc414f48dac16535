"""What is wrong, or looks wrong, before hours of training: settings, rows, room on the disk and in memory.

A fault is a sentence that says what stands in the way, and its mend; a warning, what the user may not have meant.
"""

import importlib.util
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from lorafleet.config import Settings, Training
from lorafleet.errors import LoRAFleetError, TrainingError, closest
from lorafleet.models import check_readable
from lorafleet.tasks import Corpus
from lorafleet.training.figures import ModelSize, RowFigures

FEWEST_ROWS = 16
ONE_SIDED = 0.9
SHOWN_CHARACTERS = 60
GIB = 2**30


def setting_faults(settings: Settings) -> list[str]:
    """The settings that contradict each other or cannot be followed, all of them."""
    training, device = settings.training, settings.models.device
    gpus, together = training.gpus_per_worker, training.workers_per_adapter
    faults = []
    if gpus and device == "cpu":
        faults.append(f"models.device is cpu, and training.gpus_per_worker = {gpus:g}. Set one to auto, or the other to 0")
    if not gpus and device == "cuda":
        faults.append("models.device is cuda, and training.gpus_per_worker is 0. Set training.gpus_per_worker to 1")
    if gpus > 1 and gpus != int(gpus):
        faults.append(f"training.gpus_per_worker = {gpus:g}. Give a part of one GPU, or whole ones")
    if together > 1 and 0 < gpus < 1:
        faults.append(
            f"training.workers_per_adapter = {together}, and training.gpus_per_worker = {gpus:g}: workers of one adapter"
            " would wait for each other on one GPU. Set training.gpus_per_worker to 1"
        )
    if training.workers is not None and training.workers < together:
        faults.append(
            f"training.workers = {training.workers}, and training.workers_per_adapter = {together}."
            " Raise the first, or lower the second"
        )
    if training.batch * training.accumulation < together:
        faults.append(
            f"a step has training.batch * training.accumulation = {training.batch * training.accumulation} rows for"
            f" training.workers_per_adapter = {together}. Raise the first, or lower the second"
        )
    if not gpus:
        for name, wanted in (("backend", "unsloth"), ("quantization", "4bit")):
            if getattr(training, name) == wanted:
                faults.append(
                    f"training.{name} is {wanted}, which needs CUDA, and training.gpus_per_worker is 0."
                    " Set training.gpus_per_worker to 1"
                )
    package = training.tracking
    if package != "none" and importlib.util.find_spec(package) is None:
        faults.append(f"training.tracking is {package}, which is not installed. pip install lorafleet[tracking]")
    return faults


def base_faults(settings: Settings) -> list[str]:
    """The base model cannot be read."""
    try:
        check_readable(settings.models)
    except LoRAFleetError as error:
        return [str(error)]
    return []


def module_faults(settings: Settings, size: ModelSize) -> list[str]:
    """Nothing of the base model would be trained."""
    if size.lora_parameters:
        return []
    layers = ", ".join(size.linear)
    return [f"training.modules = {settings.training.modules}, and {settings.models.base} has none of them. It has: {layers}"]


def module_warnings(settings: Settings, size: ModelSize) -> list[str]:
    """Some of what was to be trained is not there."""
    if not size.lora_parameters:
        return []
    base = settings.models.base
    return [
        f"training.modules names {name}, which {base} does not have. {closest(name, size.linear)}" for name in size.unknown
    ]


def row_warnings(corpora: Mapping[str, Corpus], figures: Mapping[str, RowFigures], training: Training) -> list[str]:
    """Tasks with few rows, or with options of which nearly always the same one is right; rows that lose their middle."""
    warnings = []
    for task, corpus in corpora.items():
        rows, of_a_step = len(corpus.examples), training.batch * training.accumulation
        if rows < max(FEWEST_ROWS, of_a_step):
            warnings.append(f"{task} has {rows} rows, which is few (a step takes {of_a_step})")
        share, answer = _most_common(corpus)
        if share > ONE_SIDED:
            warnings.append(f"{task}: the answer is {answer} in {share:.0%} of its rows; an adapter learns to say it always")
    return [*warnings, *_cut_rows(figures, training)]


def _most_common(corpus: Corpus) -> tuple[float, str]:
    """The share of the most common right option, and which one it is; 0 where a task has no options."""
    chosen = [example for example in corpus.examples if example.options]
    if len(chosen) < FEWEST_ROWS:
        return 0.0, ""
    places = Counter(example.options.index(example.answer) for example in chosen)
    place, count = places.most_common(1)[0]
    words = {example.options[place] for example in chosen if len(example.options) > place}
    return count / len(chosen), repr(words.pop()) if len(words) == 1 else f"option {place + 1}"


def _cut_rows(figures: Mapping[str, RowFigures], training: Training) -> list[str]:
    cut = {task: figure for task, figure in figures.items() if figure.cut}
    if not cut:
        return []
    total, rows = sum(figure.cut for figure in cut.values()), sum(figure.rows for figure in figures.values())
    counts = ", ".join(f"{task} {figure.cut} of {figure.rows}" for task, figure in cut.items())
    task, longest = max(cut.items(), key=lambda item: item[1].longest)
    beginning = " ".join(longest.longest_example.key.split())[:SHOWN_CHARACTERS]
    return [
        f"{total} of {rows} rows are longer than training.max_tokens = {training.max_tokens} and lose their middle:"
        f" {counts}; the longest is of {task}, {longest.longest} tokens: '{beginning}...'"
    ]


def disk_faults(folder: Path, needed: int) -> list[str]:
    """There is less room than `needed` bytes where `folder` is, or will be; or nothing can be written there."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        return [f"state = {folder}, and {there} is a file. Give a folder with --state"]
    free = shutil.disk_usage(there).free
    if free >= needed:
        return []
    return [
        f"adapters and checkpoints take up to {needed / GIB:.2f} GiB, and {folder} has {free / GIB:.2f} GiB left."
        " Make room, set --state to another disk, or train fewer at once (training.workers)"
    ]


def memory_faults(where: str, room: int, workers: int, needed: int) -> list[str]:
    """So many workers on one machine or GPU need more than its `room` in bytes, at `needed` bytes each."""
    if workers * needed <= room:
        return []
    return [
        f"{where} has {room / GIB:.1f} GiB of memory for {workers} workers, which need at least {needed / GIB:.1f} GiB each"
        " for the base model. Lower training.workers, or raise training.cpus_per_worker or training.gpus_per_worker"
    ]


def refuse(faults: Iterable[str]) -> None:
    """Raise all faults as one error; nothing where there is none.

    Raises:
        TrainingError: there are some.
    """
    found = list(faults)
    if len(found) == 1:
        raise TrainingError(found[0])
    if found:
        listed = "; ".join(f"({number}) {fault}" for number, fault in enumerate(found, start=1))
        raise TrainingError(f"{len(found)} things stand in the way: {listed}")
