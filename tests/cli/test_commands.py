"""The command line as people meet it: exit codes, one line for an error, data with --json."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

LORAFLEET = Path(sys.executable).with_name("lorafleet")


def lorafleet(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([LORAFLEET, *arguments], capture_output=True, text=True, timeout=120, check=False, **options)


def test_tasks_as_data():
    done = lorafleet("tasks", "--tasks", "piqa,imdb", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == [
        {"task": "piqa", "family": "commonsense", "train": 32, "evaluation": 10, "bad": 0, "source": "sample pack"},
        {"task": "imdb", "family": "sentiment", "train": 0, "evaluation": 10, "bad": 0, "source": "sample pack"},
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tasks", "--tasks", "piqqa"), "lorafleet: no task named 'piqqa'. Did you mean piqa?"),
        (("tasks", "--set", "training.rnk=1"), "lorafleet: unknown setting training.rnk = 1. Did you mean training.rank?"),
        (("evaluate", "--setting", "odd"), "lorafleet: --setting is 'odd'. Allowed: iid, ood"),
        (("tasks", "--config", "nowhere.yaml"), "lorafleet: no settings file at nowhere.yaml"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(arguments, said):
    done = lorafleet(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1 and not done.stdout


def test_debug_shows_the_traceback_and_bad_usage_is_2():
    assert "Traceback" in lorafleet("tasks", "--tasks", "piqqa", "--debug").stderr
    assert lorafleet("tasks", "--no-such-option").returncode == 2
    assert lorafleet("embed", "--no-such-option").returncode == 2


def test_without_index_or_endpoint_the_mend_is_said(tmp_path):
    settings = ["--state", str(tmp_path), "--set", "index.url=http://127.0.0.1:9", "--set", "serving.port=9"]
    done = lorafleet("route", "a query", *settings)
    assert done.returncode == 1
    assert "no Chroma server answers at index.url = http://127.0.0.1:9" in done.stderr and "lorafleet up" in done.stderr
    status = json.loads(lorafleet("status", "--json", *settings).stdout)
    assert (status["endpoint"], status["chroma"], status["adapters"], status["indexed_rows"]) == (None, None, 0, 0)
    assert lorafleet("down", *settings).stdout == "Nothing was running\n"


def test_a_job_refuses_a_state_folder_that_ray_would_delete(tmp_path):
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "x"
    folder.mkdir(parents=True)
    done = lorafleet("status", cwd=folder)
    assert done.returncode == 1
    assert "state = state is relative" in done.stderr and "LORAFLEET_STATE" in done.stderr


def test_a_key_is_shown_once_and_listed_without_what_opens(tmp_path):
    state = ["--state", str(tmp_path)]
    key = lorafleet("keys", "add", "ci", "--role", "admin", *state).stdout.strip()
    listed = lorafleet("keys", "list", "--json", *state).stdout
    assert key.startswith("lf-") and key not in listed
    assert [(row["name"], row["role"]) for row in json.loads(listed)] == [("ci", "admin")]
    assert "role is 'root'. Allowed: use, admin" in lorafleet("keys", "add", "me", "--role", "root", *state).stderr
    assert "open to all" in lorafleet("keys", "remove", "ci", *state).stdout


def test_without_an_endpoint_adapters_are_listed_from_storage_and_cannot_be_changed(tmp_path):
    settings = ["--state", str(tmp_path), "--set", "serving.port=9"]
    assert json.loads(lorafleet("adapters", "--json", *settings).stdout) == []
    done = lorafleet("adapters", "remove", "seas", *settings)
    assert done.returncode == 1
    assert done.stderr == "lorafleet: no endpoint listens at http://127.0.0.1:9. Start it: lorafleet up\n"
