"""The job on a real Ray: skips what is current, survives a broken task, a killed worker and a killed driver."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import ray
from tiny_language_model import write_tiny_model

from jobs.train_adapters import main, train_adapters
from lorafleet.config import Settings, load_settings
from lorafleet.tasks import load_catalogue, load_corpus
from lorafleet.tasks.corpus import SAMPLES
from lorafleet.training import adapter_name, choose_backend, read_card, train_adapter
from lorafleet.training.checkpoints import checkpoint_folder

PATIENCE_SECONDS = 240

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", autouse=True)
def cluster():
    context = ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_settings(base, tmp_path):
    def make(tasks, steps=3, **training):
        recipe = {"rank": 4, "max_steps": steps, "learning_rate": 0.02, "warmup_steps": 1, "max_tokens": 96}
        return load_settings(
            state=tmp_path / "state",
            models={"base": str(base), "device": "cpu"},
            tasks=tasks,
            training={**recipe, "accumulation": 1, **training},
        )

    return make


def test_trains_two_skips_both_and_then_trains_the_one_whose_row_changed(make_settings, tmp_path):
    rows = (SAMPLES / "wnli" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(rows[:8]) + "\n", encoding="utf-8")
    (tmp_path / "own.yaml").write_text(
        "own:\n  family: test\n  files: {train: own.jsonl}\n  instruction: Say what follows.\n"
        '  text: "{sentence1} {sentence2}"\n  options: ["no", "yes"]\n  label: label\n',
        encoding="utf-8",
    )
    settings = make_settings({"names": ["copa", "own"], "declarations": [tmp_path / "own.yaml"]})
    first = train_adapters(settings)
    assert first.failed == {}
    assert set(first.adapters) == {"copa", "own"}
    assert all(card.last_loss < card.first_loss for card in first.adapters.values())
    assert set(train_adapters(settings).skipped) == {"copa", "own"}
    own.write_text("\n".join(rows[1:9]) + "\n", encoding="utf-8")
    third = train_adapters(settings)
    assert third.skipped == ("copa",)
    assert third.adapters["own"].corpus != first.adapters["own"].corpus


def place(settings: Settings, task: str) -> Path:
    return settings.adapters / adapter_name(settings, task)


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def checkpoints_of(settings: Settings, task: str) -> list[Path]:
    return list(checkpoint_folder(place(settings, task)).glob("*.pt"))


def undisturbed(settings: Settings, task: str, folder: Path) -> bytes:
    """The weights as one process trains them that nobody stops."""
    corpus = load_corpus(load_catalogue(settings.tasks)[task], "train", settings.tasks)
    train_adapter(*choose_backend(settings).load(settings), corpus, settings, "name", folder, lambda *_: None)
    return weights(folder)


def written(settings: Settings, path: Path) -> Path:
    """The settings as a file for the job's command line."""
    path.write_text(json.dumps(settings.model_dump(mode="json")))
    return path


def wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_failures_stay_alone_and_the_exit_code_and_the_last_lines_tell(make_settings, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.jsonl").write_text('{"text": "x", "label": 9}\n', encoding="utf-8")
    (tmp_path / "broken.yaml").write_text(
        "broken:\n  family: test\n  files: {train: broken.jsonl}\n  instruction: Say it.\n"
        '  text: "{text}"\n  options: ["no", "yes"]\n  label: label\n',
        encoding="utf-8",
    )
    settings = make_settings({"names": ["broken", "copa", "wnli"], "declarations": [tmp_path / "broken.yaml"]})
    settings.adapters.mkdir(parents=True)
    place(settings, "wnli").symlink_to("nowhere")  # No folder can be renamed to this place.
    monkeypatch.setattr(sys, "argv", ["train_adapters", "--config", str(written(settings, tmp_path / "settings.yaml"))])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    output = capsys.readouterr()
    assert "1 trained, 0 skipped, 2 failed" in output.out
    assert "failed: broken: task broken has no usable row" in output.err
    assert "failed: wnli: NotADirectoryError" in output.err
    assert read_card(place(settings, "copa")) is not None

    place(settings, "wnli").unlink()
    again = train_adapters(
        settings.model_copy(update={"tasks": settings.tasks.model_copy(update={"names": ["copa", "wnli"]})})
    )
    assert again.skipped == ("copa",)
    assert again.failed == {}


def test_force_begins_again_and_trains_the_same(make_settings):
    settings = make_settings({"names": ["copa"]})
    assert train_adapters(settings).failed == {}
    before = weights(place(settings, "copa"))
    leftover = checkpoint_folder(place(settings, "copa"))
    leftover.mkdir()
    assert train_adapters(settings).skipped == ("copa",)
    assert not leftover.exists()
    forced = train_adapters(settings, force=True)
    assert forced.skipped == ()
    assert weights(place(settings, "copa")) == before


def test_a_killed_workers_adapter_goes_on_from_its_checkpoint_and_ends_the_same(make_settings, tmp_path):
    settings = make_settings({"names": ["copa", "wnli"]}, steps=120, workers=1, checkpoint_steps=10)
    killed = []

    def kill_in_the_middle_of_the_second():
        wait_until(
            lambda: all(place(settings, task).exists() or checkpoints_of(settings, task) for task in ("copa", "wnli"))
        )
        for process in psutil.Process().children(recursive=True):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)

    killer = threading.Thread(target=kill_in_the_middle_of_the_second)
    killer.start()
    report = train_adapters(settings)
    killer.join()
    assert len(killed) == 1
    assert report.failed == {}
    assert sorted(bool(card.resumed) for card in report.adapters.values()) == [False, True]
    for task in ("copa", "wnli"):
        assert weights(place(settings, task)) == undisturbed(settings, task, tmp_path / task)
    assert all(read_card(folder) is not None for folder in settings.adapters.iterdir())


def test_a_killed_driver_is_submitted_again_and_continues(make_settings, tmp_path, cluster):
    settings = make_settings({"names": ["copa"]}, steps=120, checkpoint_steps=10)
    command = [sys.executable, "-m", "jobs.train_adapters", "--config", str(written(settings, tmp_path / "settings.yaml"))]
    environment = {**os.environ, "RAY_ADDRESS": cluster}
    driver = subprocess.Popen(command, env=environment)
    wait_until(lambda: len(checkpoints_of(settings, "copa")) == 2)
    driver.kill()
    driver.wait()
    again = subprocess.run(command, env=environment, timeout=PATIENCE_SECONDS, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "1 trained, 0 skipped, 0 failed" in again.stdout
    card = read_card(place(settings, "copa"))
    assert card is not None
    assert card.resumed
    assert weights(place(settings, "copa")) == undisturbed(settings, "copa", tmp_path / "undisturbed")
    assert list(settings.adapters.iterdir()) == [place(settings, "copa")]
