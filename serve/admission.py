"""What an adapter has to pass before it may come in. Nothing here trusts what lies in the folder, or changes it.

Every refusal is an ApiError that names the field of the request.
"""

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote, urlsplit

from lorafleet.adapters import Roster, adapter_shape, stored_adapter
from lorafleet.composition.files import CONFIG_BYTES, CONFIG_FILE, WEIGHTS_FILE
from lorafleet.config import Index, Models, Settings
from lorafleet.errors import AdapterError, TaskError, shown, shown_name
from lorafleet.models import fingerprint, locate, pick_dtype, short_name, unpacked
from lorafleet.tasks import Example, formless, load_catalogue, texts_to_embed
from lorafleet.tasks.bounds import ByteLimit
from lorafleet.tasks.files import read_rows
from lorafleet.tasks.task import Task
from lorafleet.tasks.values import BadRowError, scalar
from lorafleet.training.cards import CARD, read_card
from serve.choosing import AUTO, BASE
from serve.errors import SERVER_ERROR, ApiError, sentence
from serve.protocol.requests import AdapterRequest

if TYPE_CHECKING:
    from lorafleet.composition.groups import LayerGroup

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
# Loading one of these runs the code that is in it.
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"}
ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}
MOST_ENTRIES = 1000
LONGEST_TEXT = 32_768
PIECE_BYTES = 1024 * 1024


def check_name(newcomer: AdapterRequest, roster: Roster, folder: Path) -> None:
    """Refuse a name or task that cannot be a folder's, that means something else already, or that is taken.

    Args:
        folder: of all adapters.
    """
    for field, value in (("name", newcomer.name), ("task", newcomer.task_name)):
        if not NAME.fullmatch(value):
            raise ApiError.bad_request(
                f"{field} is {value[:100]!r}. Allowed: up to 96 letters, digits, '.', '_' and '-', not a sign first",
                field,
            )
        if value.lower() in (AUTO, BASE):
            raise ApiError.bad_request(f"{field} is {value!r}, which has a meaning of its own. Choose another", field)
        if value in roster:
            raise taken(field, value, f"as that of the adapter of {roster.task_of(value)}")
    if (folder / newcomer.name).exists():
        raise taken("name", newcomer.name, "by a folder in storage")


def taken(field: str, value: str, by: str) -> ApiError:
    """409 for what is there already."""
    message = f"{field} is {value!r}, which is taken {by}. Choose another, or remove that one first"
    return ApiError(409, message, param=field, code="taken")


def resolved(location: str, field: str, settings: Settings) -> Path:
    """The real path of a folder or file, which has to be below one of the allowed roots."""
    try:
        parts = urlsplit(location)
    except ValueError:
        parts = urlsplit("unreadable://")
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        path = Path(unquote(parts.path))
    elif "://" in location:
        raise ApiError.bad_request(
            f"{field} is {location[:200]!r}. Allowed: a path, or a URI that begins with file://", field
        )
    else:
        path = Path(location)
    if not path.is_absolute():
        raise ApiError.bad_request(f"{field} is {location[:200]!r}. Allowed: an absolute path", field)
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        # Whether there is anything outside the roots is nobody's business.
        real = None
    if real is None or not _below_a_root(real, settings):
        allowed = ", ".join(str(root.resolve()) for root in settings.adapter_roots)
        raise ApiError.bad_request(
            f"{field} is {location[:200]!r}, and nothing is there below {allowed}. "
            "Put it there, or add its folder to serving.adapter_roots",
            field,
        )
    return real


def check_folder(folder: Path, settings: Settings) -> None:
    """Refuse a folder that holds more than a safe adapter: pickles, archives, links out of the roots, too much."""
    try:
        _check_entries(folder, settings)
        absent = [needed for needed in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / needed).is_file()]
    except OSError as error:
        raise _unreadable(folder, error) from None
    if absent:
        raise ApiError.bad_request(f"source holds no {absent[0]}. Save the adapter with PEFT's save_pretrained", "source")


def _check_entries(folder: Path, settings: Settings) -> None:
    if not folder.is_dir():
        hint = "Unpack it" if folder.suffix.lower() in ARCHIVES else "Give the folder that it lies in"
        raise ApiError.bad_request(f"source is the file {shown_name(folder.name)}, not a folder. {hint}", "source")
    entries = list(islice(_entries(folder), MOST_ENTRIES + 1))
    if len(entries) > MOST_ENTRIES:
        raise ApiError.bad_request(f"source holds more than {MOST_ENTRIES} files. Give the adapter's own folder", "source")
    for path in entries:
        name = shown_name(str(path.relative_to(folder)))
        if path.suffix.lower() in PICKLES:
            raise ApiError.bad_request(
                f"source holds {name}, which can carry code. Only safetensors are taken: save again with "
                "safe_serialization=True, and leave out optimiser and trainer states",
                "source",
            )
        if path.suffix.lower() in ARCHIVES:
            raise ApiError.bad_request(f"source holds the archive {name}. Unpack it, or leave it out", "source")
        real = _real(path, folder, settings)
        if not (real.is_file() or real.is_dir()):
            raise ApiError.bad_request(f"source holds {name}, which is neither file nor folder. Leave it out", "source")


def copy_in(folder: Path, beside: Path, settings: Settings) -> None:
    """Copy what makes an adapter, and nothing else, into a new folder; what is checked later is this copy."""
    left = settings.serving.adapter_mib * 2**20
    with writing():
        beside.mkdir(parents=True)
        for name, limit in ((CONFIG_FILE, CONFIG_BYTES), (CARD, CONFIG_BYTES), (WEIGHTS_FILE, left)):
            if os.path.lexists(folder / name):
                left -= _copy(_real(folder / name, folder, settings), beside / name, min(limit, left))


def check_adapter(beside: Path, newcomer: AdapterRequest, settings: Settings) -> None:
    """Refuse a copied adapter that cannot be read, was trained on another base model, or has too large a rank."""
    # Not above: torch takes seconds to import, and is needed when an adapter comes.
    import torch

    from lorafleet.composition import AdapterPool, check_number_format, load_adapter

    try:
        adapter = load_adapter(beside, newcomer.task_name)
        # Where the format is the device's choice, only the generators know it: they check again.
        check_number_format(adapter, pick_dtype(settings.models.dtype, torch.device("cpu")))
        base = adapter_shape(stored_adapter(beside)).base
    except AdapterError as error:
        raise ApiError.bad_request(sentence(error).replace(str(beside), "source"), "source") from None
    models, limit = settings.models, settings.serving.adapter_rank
    card = read_card(beside)
    if card is not None and card.base_fingerprint != fingerprint(models.base, models.base_revision):
        raise ApiError.bad_request(
            f"source was trained on {shown_name(card.base)} {shown_name(card.base_fingerprint)}, and the fleet's base model "
            f"is {models.base} {fingerprint(models.base, models.base_revision)}. Train it on that one",
            "source",
        )
    if adapter.rank > limit:
        raise ApiError.bad_request(
            f"source has rank {adapter.rank}. Allowed: at most {limit} (serving.adapter_rank)", "source"
        )
    try:
        # On no device: the generators' own check, without their memory.
        AdapterPool(base_groups(models), torch.device("meta"), torch.float32, pages=limit, page_rank=1).add(adapter)
    except AdapterError as error:
        named = short_name(base) == short_name(models.base) or not base
        other = "" if named else f" It names {shown(base)} as its base model, and the fleet's is {models.base!r}"
        raise ApiError.bad_request(f"source does not fit: {sentence(error)}{other}", "source") from None


@lru_cache(maxsize=1)
def base_groups(models: Models) -> "list[LayerGroup]":
    """The linear layers of the base model, from its configuration alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lorafleet.composition.groups import layer_groups

    config = AutoConfig.from_pretrained(unpacked(locate(models.base)), revision=models.base_revision or "main")
    with torch.device("meta"):
        return layer_groups(AutoModelForCausalLM.from_config(config))


@dataclass(frozen=True)
class NewRow:
    """A row that comes with an adapter: what identifies it, and the texts whose vectors' mean is its own."""

    key: str
    texts: tuple[str, ...]


def read_new_rows(newcomer: AdapterRequest, settings: Settings) -> list[NewRow]:
    """The rows as `jobs/embed_corpora.py` would have them.

    One with a `text` alone is its own key, in all forms; one with other columns is rendered by the catalogue's task of that
    name.
    """
    field = "rows" if newcomer.corpus is None else "corpus"
    task = _declared(newcomer.task_name, settings)
    rows: Iterable[tuple[int, Any]] = enumerate(newcomer.rows or ())
    if newcomer.corpus is not None:
        columns = frozenset({"text"}) if task is None else task.columns | {"text"}
        rows = _numbered(resolved(newcomer.corpus, field, settings), columns, settings)
    limit = settings.serving.adapter_rows
    found = []
    for number, row in rows:
        try:
            found.append(_new_row(row, task, settings.index))
        except BadRowError as error:
            raise ApiError.bad_request(f"{field}.{number}: {error}", f"{field}.{number}") from None
        if len(found) > limit:
            raise ApiError.bad_request(f"{field} holds more than {limit} rows (serving.adapter_rows). Send fewer", field)
    if newcomer.corpus is not None and not found:
        raise ApiError.bad_request(f"{field} is {newcomer.corpus!r}, which holds no row", field)
    return found


def _below_a_root(real: Path, settings: Settings) -> bool:
    return any(root.resolve() in real.parents for root in settings.adapter_roots)


def _real(path: Path, folder: Path, settings: Settings) -> Path:
    """A file without the links on the way to it, which may not lead out of the roots."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError):
        # A link to itself.
        real = None
    if real is None or not _below_a_root(real, settings):
        name = shown_name(str(path.relative_to(folder)))
        raise ApiError.bad_request(f"source holds {name}, a link to somewhere else. Put the file itself there", "source")
    return real


def _entries(folder: Path) -> Iterator[Path]:
    """Everything below a folder, one after the other; links are named, and not followed."""
    folders = [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                yield Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))


def _copy(file: Path, to: Path, limit: int) -> int:
    """Copy at most `limit` bytes of a plain file, and say how many there were."""
    with _opened(file) as read, to.open("xb") as written:
        copied = 0
        while piece := _piece(read, file):
            copied += len(piece)
            if copied > limit:
                raise ApiError.bad_request(
                    f"source holds {file.name} with more than {limit} bytes (serving.adapter_mib)", "source"
                )
            written.write(piece)
    return copied


def _opened(file: Path) -> BinaryIO:
    """A plain file by its real path: no part of it may have become a link, or the file a pipe, since it was checked."""
    # To search a folder, and not to list it, is all that is needed; not every system tells these apart.
    search = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW
    try:
        at = os.open(file.anchor, search)
        try:
            for part in file.parts[1:-1]:
                below = os.open(part, search, dir_fd=at)
                os.close(at)
                at = below
            opened = os.open(file.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
        finally:
            os.close(at)
    except OSError as error:
        raise _unreadable(file, error) from None
    read = os.fdopen(opened, "rb")
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        read.close()
        raise ApiError.bad_request(f"source holds {file.name}, which is no plain file", "source")
    return read


def _piece(read: BinaryIO, file: Path) -> bytes:
    try:
        return read.read(PIECE_BYTES)
    except OSError as error:
        raise _unreadable(file, error) from None


@contextmanager
def writing() -> Iterator[None]:
    """Answer 503 where the folder of adapters is full, or cannot be written."""
    try:
        yield
    except OSError as error:
        message = f"the folder of adapters cannot be written: {error.strerror}"
        raise ApiError(503, message, SERVER_ERROR, code="storage") from None


def _unreadable(path: Path, error: OSError) -> ApiError:
    return ApiError.bad_request(
        f"source: {shown_name(path.name)} cannot be read: {error.strerror}. Let the endpoint's user read it", "source"
    )


def _declared(task: str, settings: Settings) -> Task | None:
    catalogue = load_catalogue(settings.tasks.model_copy(update={"names": None}))
    return catalogue[task] if task in catalogue else None  # noqa: SIM401


def _numbered(file: Path, columns: frozenset[str], settings: Settings) -> Iterator[tuple[int, Any]]:
    try:
        for number, row in read_rows(file, columns, ByteLimit(settings.serving.adapter_mib * 2**20, "serving.adapter_mib")):
            if isinstance(row, BadRowError):
                raise ApiError.bad_request(f"corpus.{number}: {row}", f"corpus.{number}")
            yield number, row
    except TaskError as error:
        raise ApiError.bad_request(f"corpus cannot be read: {sentence(error)}", "corpus") from None


def _new_row(row: str | Mapping[str, Any], task: Task | None, index: Index) -> NewRow:
    if isinstance(row, Mapping) and set(row) != {"text"}:
        if task is None:
            raise BadRowError("it has other columns than text, and no task of that name is declared. Send {'text': ...}")
        example = _rendered(row, task)
        key, texts = example.key, texts_to_embed(task, example, index)
    else:
        key = scalar(row if isinstance(row, str) else row["text"], "text")
        if not isinstance(key, str):
            raise BadRowError("text is a number or a date, not a text")
        texts = formless(key, index)
    if len(key) > LONGEST_TEXT:
        raise BadRowError(f"it has {len(key)} characters. Allowed: {LONGEST_TEXT}")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise BadRowError("it holds half of a surrogate pair, which is no character") from None
    return NewRow(key, texts)


def _rendered(row: Mapping[str, Any], task: Task) -> Example:
    try:
        return task.render(row)
    except (TypeError, AttributeError) as error:
        raise BadRowError(f"it does not fit the task {task.name}: {error}") from None
