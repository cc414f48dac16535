"""The job on a real Ray: parts over workers, a worker that is killed, a part that fails, and nothing left to do."""

import threading
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest
import ray
from evaluation.rigged import SCORES, rigged_settings, write_rows

from jobs.evaluate import Queue, evaluate
from lorafleet.evaluation import read_results
from lorafleet.evaluation.records import Part


def test_who_has_worked_at_a_task_goes_on_with_it():
    queue = Queue()
    parts = [Part(task, "iid", method) for task, methods in (("a", "12"), ("b", "123")) for method in methods]
    for part in parts:
        queue.put(part)
    assert queue.take("a") == parts[0]
    assert queue.take(None) == parts[2], "the task with most parts left"
    assert [queue.take("a"), queue.take("a")] == [parts[1], parts[3]], "then another one"
    queue.put(parts[3])
    assert {queue.take(None), queue.take(None)} == {parts[3], parts[4]} and queue.take(None) is None
    assert queue.tries[parts[3]] == 2 and queue.tries[parts[0]] == 1


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.integration
def test_a_killed_worker_and_a_failing_part_lose_nothing_else(tmp_path, cluster):
    settings = rigged_settings(tmp_path, generation={"rows": 4, "longest": 256})
    methods = ["base", "perfect", "selection"]
    write_rows(tmp_path / "rows" / "weather.jsonl", [("a long storm " * 40, "y")])
    killed: list[int] = []
    over = threading.Event()

    def kill_one() -> None:
        while not killed and not over.wait(0.05):
            if any((tmp_path / "state" / "evaluation" / "predictions").rglob("*.parquet")):
                for process in psutil.Process().children(recursive=True):
                    # Other tests leave zombies, which have no command line any more.
                    with suppress(psutil.NoSuchProcess):
                        if not killed and "ray::Worker" in " ".join(process.cmdline()):
                            process.kill()
                            killed.append(process.pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        outcome = evaluate(settings, methods, "all", case_study=True)
    finally:
        over.set()
        killer.join()
    assert killed
    assert {(part.task, part.method) for part in outcome.failed} == {("weather", "base"), ("weather", "selection")}
    assert all("generation.longest" in why for why in outcome.failed.values())
    assert outcome.computed == 3 * 3 + 3 * 2
    results = read_results(tmp_path / "state" / "evaluation")
    for method in methods:
        found = {task: scores.mean() for task, scores in results.scores("iid", method).items()}
        assert found == pytest.approx(SCORES["iid"][method])
    assert results.case_study is not None

    write_rows(tmp_path / "rows" / "weather.jsonl", [("a short storm", "y")])
    again = evaluate(settings, methods, "all", choose_scoring=True)
    # What failed, and base and perfect on the training rows of two tasks with options and one without.
    assert (again.kept, again.computed, again.failed) == (outcome.computed, 2 + 6, {})
    assert set(read_results(tmp_path / "state" / "evaluation").choices) == {"fruit", "ships"}
