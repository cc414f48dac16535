"""Files and folders in one step, with the modes that the umask allows."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from lorafleet.keys import add_key
from lorafleet.storage import file_in_one_step, folder_in_one_step, write_json


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o027, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_what_is_written_follows_the_umask_and_keys_are_their_owners_alone(tmp_path, umask):
    with folder_in_one_step(tmp_path / "adapter") as folder:
        save_file({"a": torch.zeros(2)}, folder / "adapter_model.safetensors")
        (folder / "1_Dense").mkdir(mode=0o700)
        save_file({"a": torch.zeros(2)}, folder / "1_Dense" / "model.safetensors")
        write_json(folder / "card.json", {})
    found = {path.name: mode(path) for path in (tmp_path / "adapter").rglob("*")}
    readable = 0o666 & ~umask
    assert found == {
        "adapter_model.safetensors": readable,
        "model.safetensors": readable,
        "card.json": readable,
        "1_Dense": 0o777 & ~umask,
    }
    add_key(tmp_path / "keys.json", "me", "use")
    assert mode(tmp_path / "keys.json") == 0o600


def test_a_secret_is_its_owners_alone_before_its_first_byte(tmp_path):
    with file_in_one_step(tmp_path / "secret", 0o600) as file:
        assert [mode(path) for path in tmp_path.iterdir()] == [0o600]
        file.write(b"secret")
    assert mode(tmp_path / "secret") == 0o600


def test_a_failure_leaves_what_was_there(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    for step in (file_in_one_step(tmp_path / "file"), folder_in_one_step(tmp_path / "folder")):
        with pytest.raises(ZeroDivisionError), step:
            raise ZeroDivisionError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "old"


def test_what_a_killed_process_left_behind_stands_in_nobodys_way(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / ".folder.old").mkdir()
    (tmp_path / ".folder.old" / "left").touch()
    with folder_in_one_step(tmp_path / "folder") as folder:
        (folder / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "new"]
