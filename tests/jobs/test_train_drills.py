"""What clusters do to a training: workers, drivers and nodes that die, nodes that join, a disk that is full."""

import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from ray.util import placement_group, remove_placement_group
from tiny_training_job import (
    PATIENCE_SECONDS,
    checkpoints_of,
    place,
    train_workers,
    undisturbed,
    wait_until,
    weights,
    written,
)

from jobs.train_adapters import train_adapters
from lorafleet.training import read_card

pytestmark = [pytest.mark.integration, pytest.mark.drill, pytest.mark.usefixtures("cluster")]


@pytest.fixture
def in_background():
    """Calls a function in a thread, and gives its future."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit


def begun(settings, task):
    return place(settings, task).exists() or bool(checkpoints_of(settings, task))


def test_a_killed_workers_adapter_goes_on_from_its_checkpoint_and_ends_the_same(make_settings, tmp_path, in_background):
    settings = make_settings({"names": ["copa", "wnli"]}, steps=120, checkpoint_steps=10)
    training = in_background(train_adapters, settings)
    wait_until(lambda: all(begun(settings, task) for task in ("copa", "wnli")))
    (worker,) = train_workers()
    worker.kill()
    report = training.result()
    assert report.failed == {}
    assert sorted(bool(card.resumed) for card in report.adapters.values()) == [False, True]
    for task in ("copa", "wnli"):
        assert weights(place(settings, task)) == undisturbed(settings, task, tmp_path / task)
    assert all(read_card(folder) is not None for folder in settings.adapters.iterdir())


def test_a_node_that_joins_is_used_and_one_that_leaves_is_not_missed(make_settings, cluster, in_background):
    names = ["copa", "wnli", "piqa"]
    # No adapter may kill a worker.
    settings = make_settings({"names": names}, steps=700, checkpoint_steps=20, workers=None, worker_failures=0)
    # One of the head's two places is taken: adapters are left over for the node that joins.
    taken = placement_group([{"CPU": 1}])
    assert taken.wait(PATIENCE_SECONDS)

    training = in_background(train_adapters, settings)
    # The first group is being started, in the only place that there is.
    wait_until((settings.state / "ray_train" / "group-1").exists)
    node = cluster.add_node(num_cpus=1)
    raylet = node.all_processes["raylet"][0].process.pid
    wait_until(lambda: bool(train_workers(raylet)))
    wait_until(lambda: sum(bool(checkpoints_of(settings, task)) for task in names) == 2)
    cluster.remove_node(node, allow_graceful=False)
    report = training.result()
    remove_placement_group(taken)
    assert report.failed == {}
    assert set(report.adapters) == set(names)
    assert sum(bool(card.resumed) for card in report.adapters.values()) == 1
    assert {folder.name for folder in settings.adapters.iterdir()} == {place(settings, task).name for task in names}


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux bounds the files of another process")
def test_a_full_disk_fails_an_adapter_clearly_and_leaves_nothing_half_written(make_settings, tmp_path, in_background, capfd):
    names = ["copa", "wnli"]
    settings = make_settings({"names": names}, steps=400, checkpoint_steps=20)
    said = ""

    def told(words):
        nonlocal said
        said += capfd.readouterr().err
        return words in said

    training = in_background(train_adapters, settings)
    wait_until(lambda: any(checkpoints_of(settings, task) for task in names))
    (worker,) = train_workers()
    _, most = resource.prlimit(worker.pid, resource.RLIMIT_FSIZE)
    # No file of this process can grow beyond 4 KiB, until there is room again for the other adapter.
    resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (4096, most))
    wait_until(lambda: told("failed: cannot write"))
    resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (most, most))
    report = training.result()
    (failed,) = report.failed
    (done,) = report.adapters
    assert f"cannot write to {settings.adapters}" in report.failed[failed]
    assert "Make room there" in report.failed[failed]
    assert told("no checkpoint of step")
    assert {path.name for path in settings.adapters.iterdir()} == {
        place(settings, done).name,
        f".training-{place(settings, failed).name}",
    }
    assert not list(settings.adapters.glob(".training-*/.*"))

    again = train_adapters(settings)
    assert again.skipped == (done,)
    assert again.adapters[failed].resumed
    assert weights(place(settings, failed)) == undisturbed(settings, failed, tmp_path / "undisturbed")


def test_a_job_that_is_stopped_or_killed_is_submitted_again_and_continues(make_settings, tmp_path, cluster):
    settings = make_settings({"names": ["copa"]}, steps=400, checkpoint_steps=10)
    command = [sys.executable, "-m", "jobs.train_adapters", "--config", str(written(settings, tmp_path / "settings.yaml"))]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    for blow in (signal.SIGTERM, signal.SIGKILL):
        before = set(checkpoints_of(settings, "copa"))
        driver = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: len(set(checkpoints_of(settings, "copa")) - before) == 2)  # noqa: B023
        driver.send_signal(blow)
        _, errors = driver.communicate(timeout=PATIENCE_SECONDS)
        if blow == signal.SIGTERM:
            assert driver.returncode == 130, errors
            assert "stopped: 0 of 1 adapters are done and stay; 1 were begun" in errors
        wait_until(lambda: not train_workers())
    again = subprocess.run(command, env=environment, timeout=PATIENCE_SECONDS, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "1 trained, 0 skipped, 0 failed" in again.stdout
    card = read_card(place(settings, "copa"))
    assert card is not None
    assert len(card.resumed) == 2
    assert weights(place(settings, "copa")) == undisturbed(settings, "copa", tmp_path / "undisturbed")
    assert list(settings.adapters.iterdir()) == [place(settings, "copa")]
