"""Ray's token: its owner's alone from the first byte, and refused where others can read it."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lorafleet.errors import LoRAFleetError
from lorafleet.ray_token import check_private, make_token, read_token

LORAFLEET = Path(sys.executable).with_name("lorafleet")


@pytest.fixture
def token(tmp_path, monkeypatch):
    """Where the token lies, under an open umask."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = os.umask(0)
    yield tmp_path / ".ray" / "auth_token"
    os.umask(before)


def test_it_is_made_for_its_owner_alone_and_never_replaced(token):
    assert read_token() == ""
    make_token()
    made = token.read_text()
    assert re.fullmatch("[0-9a-f]{64}", made) and read_token() == made
    assert [stat.S_IMODE(path.stat().st_mode) for path in (token, token.parent)] == [0o600, 0o700]
    make_token()
    assert token.read_text() == made
    check_private()


@pytest.mark.parametrize(
    ("file", "folder"), [(0o644, 0o700), (0o640, 0o700), (0o600, 0o755), (0o600, 0o770), (0o644, 0o777)]
)
def test_one_that_others_can_read_is_refused_with_the_commands_that_close_it(token, file, folder):
    make_token()
    token.chmod(file)
    token.parent.chmod(folder)
    with pytest.raises(LoRAFleetError) as caught:
        check_private()
    assert str(token) in caught.value.problem and "\n" not in str(caught.value)
    commands = re.search(r"Run: (.*?)\. Where", caught.value.mend)
    subprocess.run(commands[1], shell=True, check=True)
    check_private()


def test_a_folder_that_the_environment_names_may_be_read_and_not_written(token, tmp_path, monkeypatch):
    file = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    with pytest.raises(LoRAFleetError, match=r"names .*/token, which does not exist"):
        make_token()
    file.write_text("t\n")
    file.chmod(0o600)
    tmp_path.chmod(0o755)
    check_private()
    assert read_token() == "t"
    tmp_path.chmod(0o775)
    with pytest.raises(LoRAFleetError, match=f"Run: chmod go-w {tmp_path}"):
        check_private()


def test_up_and_doctor_refuse_it(token, tmp_path):
    make_token()
    token.chmod(0o644)
    settings = ["--state", str(tmp_path / "state"), "--set", "index.url=http://192.0.2.1:9", "--set", "serving.port=9"]
    up = subprocess.run([LORAFLEET, "up", *settings], capture_output=True, text=True, timeout=120, check=False)
    assert up.returncode == 1
    assert up.stderr.startswith(f"lorafleet: others can read or replace Ray's token in {token}")
    assert f"chmod 600 {token}" in up.stderr and up.stderr.count("\n") == 1
    environment = os.environ | {"LORAFLEET_CACHE": "/nowhere"}
    command = [LORAFLEET, "doctor", *settings[:2]]
    doctor = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert doctor.returncode == 1 and "FAULT  ray token     others can read" in doctor.stdout


def test_a_cluster_that_a_job_starts_writes_no_open_token(token):
    probe = "from jobs.cluster import connect; connect()"
    environment = os.environ | {"RAY_ADDRESS": "local"}
    subprocess.run([sys.executable, "-c", probe], check=True, timeout=240, env=environment, capture_output=True)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (token, token.parent)] == [0o600, 0o700]
