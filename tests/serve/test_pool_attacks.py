"""Folders that are made, or changed meanwhile, to do harm: one error that can be sent, and nothing stays behind."""

import asyncio
import errno
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_fleet import save_adapter, small_settings

import serve.admission
import serve.pool
from lorafleet.config import Settings
from lorafleet.errors import AdapterError
from lorafleet.training.cards import AdapterCard
from serve.admission import check_adapter, check_folder, copy_in
from serve.errors import ApiError
from serve.pool import Pool
from serve.protocol.requests import AdapterRequest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr("serve.standings.LOST_SECONDS", 0.1)
    return small_settings(tmp_path, 1, adapter_mib=1)


@pytest.fixture
def source(settings: Settings) -> Path:
    return save_adapter(settings.adapter_roots[0] / "seas", seed=7)


@pytest.fixture
def copied(settings: Settings, source: Path) -> Callable[[], Path]:
    """Let the folder in as a pool does, and give the copy."""

    def copied() -> Path:
        beside = settings.adapters / ".incoming-seas"
        check_folder(source, settings)
        copy_in(source, beside, settings)
        check_adapter(beside, AdapterRequest(name="seas", source=str(source)), settings)
        return beside

    return copied


@pytest.fixture
def in_pool(settings: Settings):
    """Do something with a pool that nobody follows and that has no index."""

    def run(what):
        async def running():
            pool = object.__new__(Pool.func_or_class)
            await pool.__init__(settings)
            try:
                return await what(pool)
            finally:
                while pool._change is not None:
                    await asyncio.sleep(0.02)
                os.close(pool._journal._lock)

        return asyncio.run(running())

    return run


def refusal(what: Callable[[], object], status: int = 400) -> str:
    """What an error says, once it is sure that it can be sent."""
    with pytest.raises(ApiError) as caught:
        what()
    assert caught.value.status == status
    assert caught.value.message.isprintable() and len(caught.value.message) < 1000
    caught.value.response()
    return caught.value.message


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """A disk, as it were, on which no file can have more bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", [b"\xff.bin", b"a\nb.zip", b"\xff\n", b"\x1b[31m.pt"])
def test_the_name_of_a_file_may_be_any_bytes(source, copied, name):
    path = os.fsencode(source) + b"/" + name
    if name.endswith(b"\n"):
        os.mkfifo(path)
    else:
        Path(os.fsdecode(path)).touch()
    assert ascii(os.fsdecode(name))[1:-1] in refusal(copied)


@pytest.fixture
def emptied(source: Path) -> Iterator[Path]:
    """The folder, removed by a tool that can: pytest's own clean-up goes as deep as recursion does."""
    yield source
    subprocess.run(["rm", "-rf", str(source)], check=True)


def test_a_folder_nested_deeper_than_recursion_goes_is_refused(emptied, copied):
    at = os.open(emptied, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("d", dir_fd=at)
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    assert "more than 1000 files" in refusal(copied)


def test_of_a_folder_with_endless_files_no_more_are_listed_than_it_may_have(source, copied, monkeypatch):
    listed = []
    scandir = os.scandir

    class Counted:
        def __init__(self, path) -> None:
            self.entries = scandir(path)

        def __enter__(self):
            return self

        def __exit__(self, *error) -> None:
            self.entries.close()

        def __iter__(self):
            for entry in self.entries:
                listed.append(entry.name)
                yield entry

    for number in range(1500):
        (source / f"{number}.txt").touch()
    monkeypatch.setattr(os, "scandir", Counted)
    assert "more than 1000 files" in refusal(copied)
    assert len(listed) == 1001


def test_a_link_to_itself_is_refused(source, copied):
    (source / "loop").symlink_to("loop")
    assert "loop, a link to somewhere else" in refusal(copied)


def test_a_folder_with_the_longest_path_is_refused_where_its_files_would_have_a_longer_one(settings):
    folder = settings.adapter_roots[0]
    while len(str(folder)) < 4080:
        folder = folder / ("d" * min(200, 4080 - len(str(folder))))
    folder.mkdir(parents=True)
    assert "cannot be read: File name too long" in refusal(lambda: check_folder(folder, settings))


@pytest.mark.parametrize("swap", ["folder", "parent", "file", "pipe"])
def test_what_is_swapped_after_it_was_checked_is_not_followed(settings, source, copied, monkeypatch, tmp_path, swap):
    """Between finding where a file really lies and opening it."""
    outside = save_adapter(tmp_path / "outside" / "seas", seed=8)
    real = serve.admission._real

    def then_swap(path: Path, *given) -> Path:
        found = real(path, *given)
        if path.name == WEIGHTS and not (tmp_path / "away").exists():
            moved = {"folder": source, "parent": source.parent}.get(swap, path)
            moved.rename(tmp_path / "away")
            if swap == "pipe":
                os.mkfifo(moved)
            else:
                moved.symlink_to({"folder": outside, "parent": outside.parent}.get(swap, outside / WEIGHTS))
        return found

    check_folder(source, settings)
    monkeypatch.setattr(serve.admission, "_real", then_swap)
    beside = settings.adapters / ".incoming-seas"
    says = refusal(lambda: copy_in(source, beside, settings))
    assert "cannot be read" in says or "no plain file" in says
    assert not (beside / WEIGHTS).exists() or (beside / WEIGHTS).stat().st_size == 0


def test_a_file_that_grows_while_it_is_copied_ends_at_the_limit(settings, source, copied, monkeypatch):
    piece = serve.admission._piece
    read = []

    def then_grow(opened, file: Path) -> bytes:
        with file.open("ab") as more:
            more.write(bytes(2**18))
        read.append(piece(opened, file))
        return read[-1]

    monkeypatch.setattr(serve.admission, "_piece", then_grow)
    monkeypatch.setattr(serve.admission, "PIECE_BYTES", 2**16)
    assert "more than" in refusal(copied)
    assert sum(map(len, read)) < 2**21


def test_sparse_files_cost_no_more_than_they_may(settings, source, copied):
    (source / "README.md").touch()
    os.truncate(source / "README.md", 2**40)
    assert sorted(path.name for path in copied().iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize(("file", "limit"), [(CONFIG, 2**20), ("card.json", 2**20), (WEIGHTS, 2**20)])
def test_sparse_files_that_are_copied_are_copied_up_to_the_limit(settings, source, copied, file, limit):
    (source / file).touch()
    os.truncate(source / file, 2**40)
    assert f"{file} with more than" in refusal(copied)
    assert sum(path.stat().st_size for path in (settings.adapters / ".incoming-seas").iterdir()) <= limit


def test_a_card_that_says_much_is_not_repeated(source, copied):
    texts = dict.fromkeys([field.name for field in fields(AdapterCard)], "")
    numbers = dict.fromkeys(["rows", "cut_rows", "steps", "first_loss", "last_loss", "seconds", "tokens"], 1)
    lists = {"training": {}, "versions": {}, "losses": [], "resumed": []}
    (source / "card.json").write_text(json.dumps(texts | numbers | lists | {"base": "x\n" * 100_000}))
    assert "source was trained on" in refusal(copied)


@pytest.mark.parametrize("number_format", ["float8_e4m3fn", "int8", "bool"])
def test_other_number_formats_are_a_400_that_names_them(source, copied, number_format):
    weights = load_file(source / WEIGHTS)
    save_file({key: value.to(getattr(torch, number_format)) for key, value in weights.items()}, source / WEIGHTS)
    assert f"is {number_format}. Allowed: float16, bfloat16, float32, float64" in refusal(copied)


def test_weights_that_overflow_in_the_fleets_number_format_are_a_400(settings, source, copied):
    weights = load_file(source / WEIGHTS)
    save_file({key: value * 1e5 for key, value in weights.items()}, source / WEIGHTS)
    beside = copied()
    half = settings.model_copy(update={"models": settings.models.model_copy(update={"dtype": "float16"})})
    says = refusal(lambda: check_adapter(beside, AdapterRequest(name="seas", source=str(source)), half))
    assert "once it is scaled, and float16 ends at 6.55e+04" in says


@pytest.mark.parametrize("size", [0, 4096])
def test_on_a_full_disk_nothing_comes_in_and_nothing_stays(settings, source, in_pool, size):
    async def add(pool) -> None:
        with files_up_to(size):
            await pool.add(AdapterRequest(name="seas", source=str(source)))

    assert (source / WEIGHTS).stat().st_size > 4096
    assert "the folder of adapters cannot be written: File too large" in refusal(lambda: in_pool(add), status=503)
    assert [path.name for path in settings.adapters.iterdir()] == [".pool.lock"]


def test_of_two_adds_of_one_name_one_is_taken(settings, source, in_pool):
    request = AdapterRequest(name="seas", source=str(source))

    async def race(pool) -> None:
        first, *others = await asyncio.gather(
            *(pool.add(request) for _ in range(3)), pool.remove("seas"), return_exceptions=True
        )
        assert first.name == "seas"
        assert [(error.status, error.code) for error in others] == [(409, "change_under_way")] * 3
        with pytest.raises(ApiError, match="taken"):
            await pool.add(request)
        removed, again = await asyncio.gather(pool.remove("seas"), pool.add(request), return_exceptions=True)
        assert removed.name == "seas" and again.status == 409

    in_pool(race)
    assert [path.name for path in settings.adapters.iterdir()] == [".pool.lock"]


@pytest.fixture
def member(settings: Settings, source: Path, in_pool) -> Path:
    """The folder of an adapter of the pool that has no rows."""
    in_pool(lambda pool: pool.add(AdapterRequest(name="seas", source=str(source))))
    return settings.adapters / "seas"


def test_on_a_full_disk_nothing_is_removed(member, in_pool):
    """`added.json` says that it has no rows, so no index is asked."""
    record = json.loads((member / "added.json").read_text())
    assert record["rows"] == 0

    async def remove(pool) -> None:
        with files_up_to(0):
            await pool.remove("seas")

    assert "the folder of adapters cannot be written: File too large" in refusal(lambda: in_pool(remove), status=503)
    assert sorted(path.name for path in member.parent.iterdir()) == [".pool.lock", "seas"]
    in_pool(lambda pool: pool.remove("seas"))
    assert [path.name for path in member.parent.iterdir()] == [".pool.lock"]


@pytest.mark.parametrize("step", ["rename", "rmtree"])
def test_a_removal_that_the_disk_stops_is_said_to_be_and_is_finished_later(member, in_pool, monkeypatch, step):
    failing = {"rename": (Path, "rename"), "rmtree": (shutil, "rmtree")}[step]
    whole = getattr(*failing)
    left = [OSError(errno.EROFS, os.strerror(errno.EROFS))]

    def fail_once(*arguments, **options):
        if left:
            raise left.pop()
        return whole(*arguments, **options)

    monkeypatch.setattr(*failing, fail_once)
    says = refusal(lambda: in_pool(lambda pool: pool.remove("seas")), status=503)
    assert says == "the folder of adapters cannot be written: Read-only file system"
    assert [path.name for path in member.parent.iterdir()] == [".pool.lock"]


@pytest.mark.parametrize("step", ["write_record", "rename"])
def test_an_add_that_the_disk_stops_is_undone(settings, source, in_pool, monkeypatch, step):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((Path, "rename") if step == "rename" else (serve.pool, "write_record")), fail)
    says = refusal(lambda: in_pool(lambda pool: pool.add(AdapterRequest(name="seas", source=str(source)))), status=503)
    assert says == "the folder of adapters cannot be written: No space left on device"
    assert [path.name for path in settings.adapters.iterdir()] == [".pool.lock"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"action": "add"}',
        b'{"action": "burn", "name": "a", "task": "a", "rows": true}',
        b'{"action": "add", "name": 5, "task": "a", "rows": true}',
        b'{"action": "add", "name": "a", "task": "a", "rows": true, "more": 1}',
    ],
)
def test_a_damaged_journal_is_one_error_that_names_it(settings, in_pool, content):
    settings.adapters.mkdir(parents=True)
    (settings.adapters / ".change.json").write_bytes(content)
    with pytest.raises(AdapterError, match=r"cannot read .*\.change\.json: it holds no change.*\. .*Delete it") as caught:
        in_pool(lambda pool: pool.note(None))
    assert str(caught.value).isprintable()
