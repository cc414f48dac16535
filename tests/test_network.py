"""This machine's own traffic, and no proxy in between; IPv6 hosts in URLs."""

import http.server
import os
import socket
import subprocess
import sys
import threading

import pytest
from small_fleet import free_port, small_settings

from lorafleet.cli.dashboard import look
from lorafleet.cli.endpoint import call_endpoint, endpoint_url
from lorafleet.cli.service import endpoint_ready
from lorafleet.config import load_settings
from lorafleet.errors import IndexUnavailable, LoRAFleetError
from lorafleet.network import bypass_proxies, in_url, takes_proxy
from lorafleet.retrieval import open_for_writing, open_index, server
from lorafleet.tasks import prompt_version
from serve.deploy import _wait_until_ready

PROXIES = [name for proxy in ("http", "https", "all") for name in (f"{proxy}_proxy".upper(), f"{proxy}_proxy")]


@pytest.fixture
def proxy(monkeypatch):
    """What a proxy gets to see that the environment names for everything."""
    seen = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def record():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    seen.append(connection.recv(200))

        thread = threading.Thread(target=record, daemon=True)
        thread.start()
        for name in PROXIES:
            monkeypatch.setenv(name, f"http://127.0.0.1:{listener.getsockname()[1]}")
        for name in ("NO_PROXY", "no_proxy"):
            # Set first, so that what is set meanwhile is undone.
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        yield seen
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.fixture
def endpoint():
    """A server that is ready, and no more."""

    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_):
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ready) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield listener.server_port
        listener.shutdown()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_a_proxy_sees_nothing_of_what_stays_on_this_machine(proxy, endpoint, tmp_path, host):
    port = free_port()
    settings = small_settings(tmp_path, port, port=endpoint, dashboard_port=endpoint)
    index = settings.index.model_copy(update={"url": f"http://{host}:{port}"})
    settings = settings.model_copy(update={"index": index})
    try:
        server.start(settings)
        open_for_writing(settings, prompt_version()).drop()
        with pytest.raises(LoRAFleetError, match="is empty"):
            open_index(settings, prompt_version()).check_filled()
    finally:
        server.stop(settings)
    assert endpoint_ready(settings)
    assert call_endpoint(settings, "GET", "/v1/adapters") == {}
    _wait_until_ready(endpoint_url(settings))
    with pytest.raises(LoRAFleetError, match="is not the dashboard"):
        look(settings)
    assert proxy == []


def test_a_command_and_its_children_spare_this_machine_and_nothing_else(proxy, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "fleet.example")
    probe = (
        "import subprocess, sys; from lorafleet.cli.running import run; "
        "run(lambda: print(subprocess.run(['env'], capture_output=True, text=True).stdout))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, env=dict(os.environ))
    said = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    assert said["NO_PROXY"] == said["no_proxy"]
    assert {"fleet.example", "127.0.0.1", "localhost", "::1"} <= set(said["NO_PROXY"].split(","))
    assert takes_proxy("https://huggingface.co/x") and takes_proxy("http://192.0.2.77:8000")
    assert not takes_proxy("http://127.8.9.1:1/x") and not takes_proxy("http://[::1]:1")


def test_what_is_excluded_already_stays_and_nothing_is_set_without_a_proxy(proxy, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    bypass_proxies()
    assert os.environ["no_proxy"] == "*" and "NO_PROXY" not in os.environ
    for name in (*PROXIES, "no_proxy"):
        monkeypatch.delenv(name)
    bypass_proxies()
    assert "NO_PROXY" not in os.environ


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("::1", "http://[::1]:8000"),
        ("::", "http://[::1]:8000"),
        ("fd00::7", "http://[fd00::7]:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("fleet.example", "http://fleet.example:8000"),
    ],
)
def test_the_endpoint_has_a_url_by_any_host(host, url):
    assert endpoint_url(load_settings(serving={"host": host})) == url
    assert in_url("[::1]") == "[::1]"


@pytest.mark.parametrize("url", ["http://[::1:8100", "http://::1", "chroma:8100", "http://h:port", "http://a b:1"])
def test_a_url_that_is_none_is_one_error(url):
    settings = load_settings(index={"url": url})
    if url == "http://a b:1":
        assert not server.answers(settings.index)
        return
    with pytest.raises(IndexUnavailable, match=r"is not a URL of a server\. Write it as http://HOST:PORT"):
        server.answers(settings.index)
