"""State folders that cannot be written, users without a home, and files that only their owner may read."""

import os
import sys

import pytest
from other_user import LORAFLEET, UID, open_to_all, run

READ_ONLY = [
    (sys.executable, "-m", "jobs.embed_corpora", "--tasks", "copa"),
    (sys.executable, "-m", "jobs.train_adapters", "--tasks", "copa"),
    (sys.executable, "-m", "jobs.train_retriever"),
    (sys.executable, "-m", "jobs.evaluate", "--methods", "base", "--tasks", "copa"),
    (LORAFLEET, "up"),
    (LORAFLEET, "evaluate", "--methods", "base", "--tasks", "copa"),
    (LORAFLEET, "keys", "add", "me"),
]
LOAD = """
import sys
from pathlib import Path
from lorafleet.composition.adapter import load_adapter
from lorafleet.errors import AdapterError
try:
    print(load_adapter(Path(sys.argv[1])).rank)
except AdapterError as error:
    print(error)
"""


@pytest.fixture
def state(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    open_to_all(folder)
    return folder


@pytest.mark.parametrize("command", READ_ONLY, ids=lambda command: " ".join(command[1:3]))
def test_a_state_that_cannot_be_written_is_one_line_before_any_work(command, state, tmp_path):
    settings = ["--state", str(state), "--set", "index.url=http://127.0.0.1:9", "--set", "serving.port=9"]
    done = run(*command, *settings, RAY_ADDRESS="local", HF_HUB_OFFLINE="1", MPLCONFIGDIR="/tmp")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("lorafleet: ") and str(state) in last and "Permission denied" in last
    assert "Traceback" not in done.stderr and "Ray" not in done.stderr
    assert not list(state.iterdir())


def test_an_adapter_that_cannot_be_copied_for_the_endpoint_is_one_line(state, make_adapter):
    adapter = make_adapter("seas")
    open_to_all(adapter)
    for file in adapter.iterdir():
        file.chmod(0o644)
    done = run(LORAFLEET, "adapters", "add", adapter, "--state", state, "--set", "serving.port=9")
    assert done.returncode == 1
    assert done.stderr.startswith(f"lorafleet: cannot copy {adapter} to {state}/incoming: Permission denied. Let this user")
    assert done.stderr.count("\n") == 1


def test_without_a_home_folder_doctor_says_what_to_set(state, tmp_path):
    state.chmod(0o777)
    done = run(LORAFLEET, "doctor", "--state", state, RAY_AUTH_TOKEN="")
    assert "Traceback" not in done.stderr
    said = [line.strip() for line in done.stdout.splitlines()]
    assert "FAULT  base model    this user has no home folder, and unpacked models would lie in ~/.cache/lorafleet" in said
    assert "Set HOME, or LORAFLEET_CACHE to a folder" in said
    assert "FAULT  ray token     this user has no home folder for Ray's token" in said


def test_doctor_names_a_state_that_it_may_not_read_and_goes_on(state):
    state.chmod(0o700)
    done = run(LORAFLEET, "doctor", "--state", state, "--set", "index.url=http://127.0.0.1:9", LORAFLEET_CACHE="/nowhere")
    assert (done.returncode, done.stderr) == (1, "")
    assert f"FAULT  state         nothing can be written to state = {state}: Permission denied" in done.stdout
    assert f"FAULT  adapters      cannot read {state}/adapters: Permission denied" in done.stdout


def test_what_only_its_owner_may_read_is_called_so_and_not_missing(state, make_adapter):
    adapter = make_adapter("seas")
    open_to_all(adapter)
    for file in adapter.iterdir():
        file.chmod(0o644)
    weights = adapter / "adapter_model.safetensors"
    assert run(sys.executable, "-c", LOAD, adapter).stdout == "4\n"
    weights.chmod(0o600)
    said = run(sys.executable, "-c", LOAD, adapter).stdout
    assert said == f"adapter seas: cannot read {weights}: Permission denied\n"


def test_a_base_model_that_may_not_be_read_is_one_line(tmp_path, state):
    from tiny_language_model import write_tiny_model

    base = write_tiny_model(tmp_path / "models")
    open_to_all(base)
    (base / "model.safetensors").chmod(0o600)
    done = run(
        LORAFLEET,
        "ask",
        "Hello",
        "--model",
        "base",
        "--state",
        state,
        "--set",
        f"models.base={base}",
        "--set",
        "serving.port=9",
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"lorafleet: cannot read {base}/model.safetensors: Permission denied")
    assert done.stderr.count("\n") == 1


def test_an_unreadable_settings_file_is_one_line(state, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("{}")
    file.chmod(0o600)
    done = run(LORAFLEET, "tasks", "--config", file)
    assert (done.returncode, done.stderr) == (1, f"lorafleet: the settings file {file} cannot be read: Permission denied\n")


def test_doctor_names_what_others_may_change_or_read(state):
    (state / "adapters").mkdir()
    (state / "adapters").chmod(0o777)
    os.chown(state, UID, UID)
    done = run(LORAFLEET, "doctor", "--state", state, LORAFLEET_CACHE="/nowhere")
    assert f"others can change {state}/adapters" in done.stdout and f"Run: chmod o-w {state}/adapters" in done.stdout
    (state / "adapters").chmod(0o755)
    (state / "keys.json").write_text('{"keys": []}')
    (state / "keys.json").chmod(0o644)
    done = run(LORAFLEET, "doctor", "--state", state, LORAFLEET_CACHE="/nowhere")
    assert f"others can read or change the keys in {state}/keys.json" in done.stdout
    (state / "keys.json").chmod(0o600)
    done = run(LORAFLEET, "doctor", "--state", state, LORAFLEET_CACHE="/nowhere")
    assert "ok     permissions   nobody else changes the state or reads the keys" in done.stdout
