"""The Chroma server of this machine: one detached process on loopback, its data in the state folder."""

import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from lorafleet import processes
from lorafleet.config import Index, Settings
from lorafleet.errors import IndexUnavailable
from lorafleet.network import is_loopback, takes_proxy
from lorafleet.storage import check_state_writable

NAME = "chroma"
START_SECONDS = 30.0
POLL_SECONDS = 0.1
HEARTBEAT_SECONDS = 5.0


def start(settings: Settings) -> bool:
    """Start the server and wait until it answers.

    Returns:
        True where it was started; False where a Chroma server answers at `index.url` already.

    Raises:
        IndexUnavailable: `index.url` is not on this machine, another program has its port, or the server ends at once.
        SettingsError: nothing can be written to the state folder.
    """
    url = settings.index.url
    if answers(settings.index):
        return False
    host, port = address(url)
    if not on_this_machine(url):
        raise IndexUnavailable(f"no Chroma server answers at index.url = {url}", "Start it there, or set another index.url")
    run_folder = run_folder_of(settings)
    if not running(settings):
        if _taken(host, port):
            raise IndexUnavailable(
                f"port {port} of index.url = {url} is taken by a program that is not Chroma",
                "End it, or give a free port: --set index.url=http://127.0.0.1:PORT",
            )
        check_state_writable(settings.state)
        settings.chroma.mkdir(parents=True, exist_ok=True)
        command = [_program(), "run", "--path", str(settings.chroma.resolve()), "--host", host, "--port", str(port)]
        processes.start(NAME, command, run_folder, env={"ANONYMIZED_TELEMETRY": "False"})
    deadline = time.monotonic() + START_SECONDS
    while not answers(settings.index):
        if not running(settings):
            raise IndexUnavailable(
                f"the Chroma server ended at once: {processes.last_words(NAME, run_folder)}",
                f"Read {processes.log_of(NAME, run_folder)}",
            )
        if time.monotonic() > deadline:
            raise IndexUnavailable(
                f"the Chroma server at {url} has not answered in {START_SECONDS:.0f} s",
                f"Read {processes.log_of(NAME, run_folder)}",
            )
        time.sleep(POLL_SECONDS)
    return True


def stop(settings: Settings) -> bool:
    """End the server that was started for this state folder; False where there was none."""
    return processes.stop(NAME, run_folder_of(settings))


def running(settings: Settings) -> bool:
    """Whether the server that was started for this state folder is alive."""
    return processes.running(NAME, run_folder_of(settings))


def answers(index: Index) -> bool:
    """Whether a Chroma server answers at `index.url`.

    Raises:
        IndexUnavailable: it is not an http or https URL.
    """
    address(index.url)
    heartbeat = f"{index.url.rstrip('/')}/api/v2/heartbeat"
    try:
        reply = httpx.get(
            heartbeat, headers=token_headers(index), timeout=HEARTBEAT_SECONDS, trust_env=takes_proxy(index.url)
        )
        return reply.is_success and "nanosecond heartbeat" in reply.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return False


def token_headers(index: Index) -> dict[str, str]:
    """The headers that carry `index.token`: Chroma's cloud reads the first, a proxy before one's own server the second."""
    return {"X-Chroma-Token": index.token, "Authorization": f"Bearer {index.token}"} if index.token else {}


def on_this_machine(url: str) -> bool:
    """Whether a URL's host is the loopback interface."""
    return is_loopback(address(url)[0])


def address(url: str) -> tuple[str, int]:
    """Host and port of `index.url`.

    Raises:
        IndexUnavailable: it is not an http or https URL.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise IndexUnavailable(
            f"index.url = {url!r} is not a URL of a server", "Write it as http://HOST:PORT, an IPv6 host in brackets"
        )
    return parts.hostname, port


def run_folder_of(settings: Settings) -> Path:
    """The folder of the records and logs of the programs that run for this state folder."""
    return settings.state / "run"


def _program() -> str:
    program = processes.find_program("chroma")
    if program is None:
        raise IndexUnavailable("there is no program `chroma` beside this Python", "Install it here: pip install chromadb")
    return program


def _taken(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=HEARTBEAT_SECONDS):
            return True
    except OSError:
        return False
