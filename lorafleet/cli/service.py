"""lorafleet up and down: the Chroma server, the Ray head and the Serve application of this machine."""

import os
import socket
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from lorafleet import processes
from lorafleet.cli.endpoint import endpoint_url
from lorafleet.cli.jobs import run_job
from lorafleet.cli.options import ConfigOption, SetOption, StateOption, settings_from
from lorafleet.config import Settings
from lorafleet.errors import LoRAFleetError
from lorafleet.network import takes_proxy
from lorafleet.ray_token import auth_mode, check_private, make_token
from lorafleet.storage import check_state_writable, read_json, write_json

RAY = "ray"
RAY_START_SECONDS = 90.0
RAY_ENVIRONMENT = {
    # Ray's workers are nice by 15 of 19, which leaves no room for one that is nicer than the others.
    "RAY_worker_niceness": "0",
    # Serve replaces a proxy that died after three looks at it: usually 30 s in which nobody is answered.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    # From the proxy to a gateway by gRPC is quicker than by tasks of Ray's actors.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    # Headers that Ray cannot decode fail in the proxy, and others let clients turn off its timeout.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy_headers.middlewares",
}
"""What every process of a cluster is to have that serves a fleet."""
PortOption = Annotated[int | None, typer.Option("--port", min=1, max=65535, help="The endpoint's port [8000].")]


def up(
    config: ConfigOption = None,
    overrides: SetOption = [],
    state: StateOption = None,
    port: PortOption = None,
) -> None:
    """Start the Chroma server, a Ray head (unless RAY_ADDRESS names a cluster) and the endpoint on this machine."""
    overrides = [*overrides, *([f"serving.port={port}"] if port else [])]
    settings = settings_from(config, overrides, state)
    check_state_writable(settings.state)
    start_services(settings)
    deploy(settings, job_arguments(config, overrides, settings))
    typer.echo(f"The endpoint is up: {endpoint_url(settings)} (lorafleet down ends it)")


def down(
    config: ConfigOption = None,
    overrides: SetOption = [],
    state: StateOption = None,
) -> None:
    """End what `lorafleet up` started: endpoint, Ray head and Chroma server."""
    settings = settings_from(config, overrides, state)
    stopped = [name for name in ("endpoint and Ray head", "Chroma server") if _stop(name, settings)]
    typer.echo(f"Stopped: {', '.join(stopped)}" if stopped else "Nothing was running")


def start_services(settings: Settings) -> None:
    """Start the Chroma server and the Ray head, where they are not up.

    Raises:
        LoRAFleetError: one of them cannot start.
    """
    from lorafleet.retrieval import server

    if server.on_this_machine(settings.index.url):
        server.start(settings)
    if not os.environ.get("RAY_ADDRESS"):
        _start_ray(settings)


def deploy(settings: Settings, arguments: list[str]) -> None:
    """Bring the Serve application up, or up to date, and wait until it answers.

    Nothing is done where it is up with these settings and these adapters: deploying restarts every replica.
    """
    record, wanted = run_folder(settings) / "deployed.json", _deployment(settings)
    if endpoint_ready(settings) and read_json(record) == wanted:
        typer.echo("Up already, with these settings and adapters")
        return
    record.unlink(missing_ok=True)
    if run_job("serve.deploy", arguments, ray_environment(settings), silent=True) != 0:
        raise LoRAFleetError("the endpoint did not come up", f"Its logs are below {settings.state / 'run'}")
    write_json(record, wanted)


def _deployment(settings: Settings) -> dict[str, Any]:
    """What an endpoint depends on: this package, its settings, and which adapters there are."""
    from lorafleet.adapters import stored_adapters

    adapters = stored_adapters(settings).adapters.values()
    return {
        "version": version("lorafleet"),
        "settings": settings.model_dump(mode="json", exclude={"tasks", "training"}),
        # Those that came in while it ran, it has.
        "adapters": {adapter.name: adapter.created for adapter in adapters if not adapter.added},
    }


def job_arguments(config: Path | None, overrides: list[str], settings: Settings) -> list[str]:
    """The options by which a job comes to the same settings."""
    arguments = ["--state", str(settings.state)]
    if config is not None:
        arguments += ["--config", str(config)]
    for override in overrides:
        arguments += ["--set", override]
    return arguments


def ray_environment(settings: Settings) -> dict[str, str]:
    """The variables that lead a job to the cluster of this machine."""
    if os.environ.get("RAY_ADDRESS"):
        return {}
    # Ray finds out by itself whether a cluster wants its token, but not where the address is given.
    return {"RAY_ADDRESS": f"127.0.0.1:{settings.serving.ray_port}", "RAY_AUTH_MODE": auth_mode()}


def run_folder(settings: Settings) -> Path:
    """Logs and process records of what runs on this machine."""
    return settings.state / "run"


def endpoint_ready(settings: Settings) -> bool:
    """Whether the endpoint answers and has loaded everything."""
    try:
        url = endpoint_url(settings)
        return httpx.get(f"{url}/readyz", timeout=5, trust_env=takes_proxy(url)).is_success
    except (httpx.HTTPError, httpx.InvalidURL):
        return False


def _start_ray(settings: Settings) -> None:
    if auth_mode() == "token":
        make_token()
        check_private()
    folder, port = run_folder(settings), settings.serving.ray_port
    if not processes.running(RAY, folder):
        _start_head(settings, folder, port)
    deadline = time.monotonic() + RAY_START_SECONDS
    # The dashboard comes up last.
    while not (_listens(port) and _listens(settings.serving.dashboard_port)):
        if not processes.running(RAY, folder):
            raise LoRAFleetError(
                f"the Ray head ended at once: {processes.last_words(RAY, folder)}", f"Read {processes.log_of(RAY, folder)}"
            )
        if time.monotonic() > deadline:
            raise LoRAFleetError(
                f"the Ray head has not come up in {RAY_START_SECONDS:.0f} s",
                f"Run this again to wait on, or 'lorafleet down' to end it; its log is {processes.log_of(RAY, folder)}",
            )
        time.sleep(0.3)


def _start_head(settings: Settings, folder: Path, port: int) -> None:
    if _listens(port):
        raise LoRAFleetError(
            f"port serving.ray_port = {port} is taken by another program",
            f"To use a Ray cluster that runs there: RAY_ADDRESS=127.0.0.1:{port}; else set another serving.ray_port",
        )
    program = processes.find_program("ray")
    if program is None:
        raise LoRAFleetError("there is no program `ray` beside this Python", "pip install 'ray[default,serve,train,data]'")
    command = [
        *(program, "start", "--head", "--block", "--disable-usage-stats"),
        *("--port", str(port), "--dashboard-port", str(settings.serving.dashboard_port)),
    ]
    environment = {"RAY_AUTH_MODE": auth_mode(), "LORAFLEET_STATE": str(settings.state), "TQDM_DISABLE": "1"}
    # One machine has nowhere to drain to: without this, ending the head takes Ray's whole 30 s.
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "2"
    environment |= RAY_ENVIRONMENT
    processes.start(RAY, command, folder, env=environment)


def _stop(name: str, settings: Settings) -> bool:
    from lorafleet.retrieval import server

    if name == "Chroma server":
        return server.stop(settings)
    (run_folder(settings) / "deployed.json").unlink(missing_ok=True)
    stopped = processes.stop(RAY, run_folder(settings), patience=30)
    if stopped:
        _forget_ray(settings.serving.ray_port)
    return stopped


def _forget_ray(port: int) -> None:
    """Take away the note by which Ray finds the cluster of a machine: a job would wait for the head that is gone."""
    note = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "ray_current_cluster"
    if note.is_file() and note.read_text(encoding="utf-8").strip().endswith(f":{port}"):
        note.unlink()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
