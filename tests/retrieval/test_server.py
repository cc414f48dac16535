import http.server
import os
import threading
import time

import psutil
import pytest

from lorafleet import processes
from lorafleet.errors import IndexUnavailable, LoRAFleetError
from lorafleet.retrieval import open_index, server
from lorafleet.storage import read_json, write_json


def test_a_recycled_process_id_is_never_killed(tmp_path):
    pid = processes.start("sleeper", ["/bin/sleep", "60"], tmp_path)
    record = read_json(tmp_path / "sleeper.json")
    write_json(tmp_path / "other.json", record | {"created": record["created"] - 3600})

    assert not processes.running("other", tmp_path)
    assert not processes.stop("other", tmp_path)
    assert psutil.pid_exists(pid)

    assert processes.start("sleeper", ["/bin/sleep", "60"], tmp_path) == pid
    assert processes.stop("sleeper", tmp_path)
    assert not processes.running("sleeper", tmp_path)


def test_a_step_of_the_clock_loses_no_process(tmp_path, monkeypatch):
    processes.start("sleeper", ["/bin/sleep", "60"], tmp_path)
    created = psutil.Process.create_time
    # As psutil tells it on Linux after the clock was set: by the time of the boot, which has moved.
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: created(process) - 3600)
    assert processes.running("sleeper", tmp_path)
    assert processes.stop("sleeper", tmp_path)


@pytest.mark.parametrize("change", [{"boot": "another"}, {"created": 1}])
def test_a_record_of_another_boot_or_process_is_not_ours(change, tmp_path):
    processes.start("sleeper", ["/bin/sleep", "60"], tmp_path)
    write_json(tmp_path / "other.json", read_json(tmp_path / "sleeper.json") | change)
    assert not processes.running("other", tmp_path)
    processes.stop("sleeper", tmp_path)


def test_a_program_and_children_that_ignore_the_request_to_end_are_killed(tmp_path):
    pid = processes.start("deaf", ["/bin/sh", "-c", "trap '' TERM; /bin/sleep 60 & echo up; wait"], tmp_path)
    while "up" not in processes.log_of("deaf", tmp_path).read_text():
        time.sleep(0.05)
    children = psutil.Process(pid).children()
    assert os.getsid(pid) == pid

    assert processes.stop("deaf", tmp_path, patience=0.5)
    assert children
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_a_program_that_is_not_there_is_one_clear_error(tmp_path):
    with pytest.raises(LoRAFleetError, match="cannot start ghost"):
        processes.start("ghost", ["/no/such/program"], tmp_path)
    assert not processes.running("ghost", tmp_path)


def test_a_port_that_another_program_has_is_refused(index_settings):
    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    settings = index_settings(url=f"http://127.0.0.1:{other.server_port}")
    try:
        with pytest.raises(IndexUnavailable, match=f"port {other.server_port} .* is taken"):
            server.start(settings)
    finally:
        other.shutdown()
        other.server_close()
    assert not server.running(settings)


def test_no_server_and_no_folder_says_how_to_start_one(index_settings):
    with pytest.raises(IndexUnavailable, match="lorafleet up"):
        open_index(index_settings(), "plain")


def test_a_server_is_started_on_this_machine_only(index_settings):
    with pytest.raises(IndexUnavailable, match=r"index\.url = http://192\.0\.2\.1"):
        server.start(index_settings(url="http://192.0.2.1:8100"))


@pytest.mark.integration
def test_the_server_starts_once_and_stops(index_settings):
    settings = index_settings()
    try:
        assert server.start(settings)
        assert not server.start(settings)
        assert server.running(settings)
        assert server.answers(settings.index)
    finally:
        assert server.stop(settings)
    assert not server.running(settings)
    assert not server.answers(settings.index)
    assert not server.stop(settings)
