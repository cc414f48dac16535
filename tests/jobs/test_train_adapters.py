"""The job on a real Ray: skips what is current, survives a broken task and a killed worker."""

import os
import signal
import threading
import time

import psutil
import pytest
import ray
from tiny_language_model import write_tiny_model

from jobs.train_adapters import train_adapters
from lorafleet.config import load_settings
from lorafleet.tasks.corpus import SAMPLES
from lorafleet.training import read_card

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    yield
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


def test_a_broken_task_is_named_and_the_other_is_trained(make_settings, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": "x", "label": 9}\n', encoding="utf-8")
    (tmp_path / "broken.yaml").write_text(
        "broken:\n  family: test\n  files: {train: broken.jsonl}\n  instruction: Say it.\n"
        '  text: "{text}"\n  options: ["no", "yes"]\n  label: label\n',
        encoding="utf-8",
    )
    settings = make_settings({"names": ["broken", "copa"], "declarations": [tmp_path / "broken.yaml"]})
    report = train_adapters(settings)
    assert set(report.adapters) == {"copa"}
    assert "broken" in report.failed["broken"]


def test_a_killed_worker_is_replaced_and_every_adapter_ends_whole(make_settings):
    settings = make_settings({"names": ["copa", "wnli"]}, steps=60, workers=1)
    killed = []

    def kill_once_the_first_adapter_is_whole():
        give_up = time.monotonic() + 240
        while time.monotonic() < give_up and not killed:
            if any(not folder.name.startswith(".") for folder in settings.adapters.glob("*")):
                for process in psutil.Process().children(recursive=True):
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(process.pid)
            time.sleep(0.05)

    killer = threading.Thread(target=kill_once_the_first_adapter_is_whole)
    killer.start()
    report = train_adapters(settings)
    killer.join()
    assert killed
    assert report.failed == {}
    assert set(report.adapters) == {"copa", "wnli"}
    assert all(read_card(folder) is not None for folder in settings.adapters.iterdir())
