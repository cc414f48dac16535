"""Who has which adapter, and what becomes of it when workers die; how it is told."""

import io

import pytest
from rich.console import Console
from rich.live import Live

from jobs.training.queue import AdapterQueue, QueueView
from jobs.training.table import Forecast, _LiveTable, _PlainLines, duration

TASKS = ("long", "middle", "short")


@pytest.fixture
def queue():
    return AdapterQueue({task: f"rows of {task}" for task in TASKS}, dict.fromkeys(TASKS, 10), deaths_allowed=1)


def waiting(queue):
    return [task for task, standing in queue.view().standings.items() if standing.state == "waiting"]


def test_every_worker_of_a_group_gets_the_same_and_groups_get_different_ones(queue):
    assert queue.take("one", 0) == ("long", "rows of long")
    assert queue.take("two", 0) == ("middle", "rows of middle")
    assert queue.take("one", 0) == ("long", "rows of long")
    assert queue.take("one", 1) == ("short", "rows of short")
    assert queue.take("two", 1) is None
    assert queue.view().left == 3


def test_a_group_that_dies_gives_back_all_that_is_not_done(queue):
    for turn in range(2):
        queue.take("one", turn)
    queue.done("one", "long", 0.5)
    queue.leave("one", "killed", blameless=False)
    assert waiting(queue) == ["middle", "short"]
    assert queue.view().standings["middle"].deaths == 1
    assert queue.view().standings["long"].state == "done"
    assert queue.view().groups == {}


def test_an_adapter_that_kills_its_workers_comes_last_and_is_given_up(queue):
    assert queue.take("one", 0)[0] == "long"
    queue.leave("one", "out of memory", blameless=False)
    assert [queue.take("two", turn)[0] for turn in range(3)] == ["middle", "short", "long"]
    queue.done("two", "middle", 0.5)
    queue.done("two", "short", 0.5)
    queue.leave("two", "out of memory", blameless=False)
    view = queue.view()
    assert [view.standings[task].state for task in TASKS] == ["failed", "done", "done"]
    assert view.reasons == {"long": "its worker died 2 times, the last time of: out of memory"}
    assert view.left == 0


def test_an_adapter_without_memory_waits_behind_the_others_once(queue):
    assert queue.take("one", 0)[0] == "long"
    queue.put_off("one", "long", "out of memory")
    assert waiting(queue) == ["long", "middle", "short"] and queue.view().left == 3
    assert [queue.take("one", turn)[0] for turn in range(1, 4)] == ["middle", "short", "long"]
    assert queue.view().warnings == ("long waits behind the others, and is tried again: out of memory",)
    queue.put_off("one", "long", "out of memory again")
    view = queue.view()
    assert view.standings["long"].state == "failed" and view.reasons == {"long": "out of memory again"}
    assert view.groups["one"].in_hand == ("middle", "short")


def test_a_node_that_leaves_is_no_adapters_fault_and_its_adapter_is_next(queue):
    for number in range(5):
        assert queue.take(f"group {number}", 0)[0] == "long"
        queue.leave(f"group {number}", "node died", blameless=True)
    assert queue.view().standings["long"].deaths == 0
    queue.take("at last", 0)
    queue.blame("long", "it was the worker after all")
    queue.blame("long", "and again")
    assert queue.view().standings["long"].state == "training"  # Whoever has it may still finish it.
    queue.leave("at last", "node died", blameless=True)
    queue.blame("long", "and again")
    assert queue.view().reasons["long"] == "its worker died 3 times, the last time of: and again"
    unbounded = AdapterQueue({"long": "rows"}, {"long": 10}, deaths_allowed=-1)
    for number in range(5):
        assert unbounded.take(f"group {number}", 0) is not None
        unbounded.leave(f"group {number}", "killed", blameless=False)
    assert unbounded.view().standings["long"].deaths == 5
    assert unbounded.view().waiting == 1


def test_a_dead_workers_last_words_change_nothing(queue):
    queue.take("one", 0)
    queue.step("long", 4, 2.0)
    queue.leave("one", "killed", blameless=True)
    queue.step("long", 5, 2.0)
    assert queue.view().standings["long"].step == 4
    queue.take("two", 0)
    queue.step("long", 3, 2.0)
    assert queue.view().standings["long"].first == 2


def test_what_waits_is_abandoned_and_what_is_in_hand_is_not(queue):
    queue.take("one", 0)
    queue.abandon("no worker can begin: no model")
    assert queue.view().reasons == dict.fromkeys(("middle", "short"), "no worker can begin: no model")
    assert queue.view().left == 1


def at_work(queue) -> QueueView:
    queue.take("one", 0)
    queue.step("long", 4, 2.5)
    queue.take("two", 0)
    queue.done("two", "middle", 0.5)
    queue.warn("the checkpoint is damaged")
    return queue.view()


def test_the_live_table_shows_every_adapter_and_the_whole(queue):
    view, screen = at_work(queue), io.StringIO()
    with Live(console=Console(file=screen, force_terminal=True, width=120)) as live:
        _LiveTable(live, Forecast(dict.fromkeys(TASKS, 100.0)), rows_a_step=4).show(view, groups=2)
    shown = screen.getvalue()
    for part in ("long", "training, resumed at 3", "4 of 10", "2.500", "done", "waiting", "the checkpoint is damaged"):
        assert part in shown
    assert "1 done, 1 in training, 1 waiting; step 14 of 30, 2 worker groups" in shown


def test_plain_lines_tell_of_an_adapter_once(queue, capsys):
    lines = _PlainLines(Forecast(dict.fromkeys(TASKS, 100.0)), rows_a_step=4)
    view = at_work(queue)
    lines.show(view, 2)
    lines.show(view, 2)
    queue.fail("one", "long", "the loss is nan")
    lines.show(queue.view(), 2)
    assert capsys.readouterr().err.splitlines() == [
        "warning: the checkpoint is damaged",
        "1 of 3: middle done, step 10 of 10, loss 0.500",
        "2 of 3: long failed: the loss is nan",
    ]


def test_the_time_left_is_that_of_the_tokens_left(queue):
    forecast = Forecast({"long": 300.0, "middle": 100.0, "short": 100.0})
    queue.take("one", 0)
    assert forecast.seconds_left(queue.view().standings, 0) is None
    queue.step("long", 6, 1.0)  # Gone on with after step 5: those steps took no time now.
    assert forecast.seconds_left(queue.view().standings, 10) is None
    queue.step("long", 8, 1.0)
    # 600 tokens in 12 s; 600 of this and 2,000 of the others are left.
    assert forecast.seconds_left(queue.view().standings, 22) == pytest.approx(2600 / 50)


@pytest.mark.parametrize(("seconds", "words"), [(0, "0 s"), (59.4, "59 s"), (185, "3:05 min"), (7800, "2:10 h")])
def test_durations_are_written_as_people_do(seconds, words):
    assert duration(seconds) == words
