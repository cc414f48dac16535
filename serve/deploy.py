"""Bring the application up on the running Ray cluster, or bring one that is up to its new settings.

python -m serve.deploy --config configs/laptop.yaml --state state
"""

import logging
import re
import time
from collections.abc import Iterator

import httpx
import ray
import typer
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from jobs.cluster import connect
from lorafleet.cli.endpoint import endpoint_url
from lorafleet.cli.options import ConfigOption, SetOption, StateOption, settings_from
from lorafleet.cli.running import run
from lorafleet.config import Settings
from lorafleet.errors import LoRAFleetError
from lorafleet.network import takes_proxy
from serve.app import APPLICATION, assemble
from serve.logs import logging_config
from serve.traces import tracing_config

START_SECONDS = 900
READY_SECONDS = 60
POLL_SECONDS = 0.5
# Serve gives up on a request only after the gateway has answered it with 504.
TIMEOUT_MARGIN_SECONDS = 30
ERROR_LINE = re.compile(r"^(?:[A-Za-z_]\w*\.)*([A-Z]\w*): (.+)$")


def deploy(settings: Settings) -> str:
    """Deploy the application, and wait until it answers.

    Run again, it replaces the replicas one by one by those of the new settings and adapters.

    Returns:
        The URL of the endpoint.

    Raises:
        LoRAFleetError: no cluster runs, a replica cannot start, or the endpoint does not get ready: why, and what to do.
    """
    connect(start=False)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serving, logs = settings.serving, logging_config(settings.logging)
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(
            host=serving.host,
            port=serving.port,
            request_timeout_s=serving.request_timeout_seconds + TIMEOUT_MARGIN_SECONDS,
        ),
        logging_config=logs,
        tracing_config=tracing_config(settings.logging),
    )
    target = serve.RunTarget(assemble(settings), name=APPLICATION, route_prefix="/", logging_config=logs)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    _wait_until_running()
    url = endpoint_url(settings)
    _wait_until_ready(url)
    return url


def _wait_until_running() -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        status = serve.status().applications.get(APPLICATION)
        if status is not None and status.status == ApplicationStatus.RUNNING:
            return
        if status is not None and status.status == ApplicationStatus.DEPLOY_FAILED:
            raise LoRAFleetError(f"the application cannot start: {' '.join(_reasons(status))}")
        if time.monotonic() > deadline:
            reasons = " ".join(_reasons(status)) if status else "Serve does not know it"
            raise LoRAFleetError(f"the application has not started in {START_SECONDS} s: {reasons}")
        time.sleep(POLL_SECONDS)


def _reasons(status: ApplicationStatusOverview) -> Iterator[str]:
    """What each deployment that does not run says, or the application where none of them speaks."""
    spoken = False
    for name, deployment in status.deployments.items():
        if deployment.message and deployment.status != "HEALTHY":
            spoken = True
            yield f"{name}: {last_error(deployment.message)}"
    if not spoken:
        yield last_error(status.message)


def last_error(message: str) -> str:
    """The error at the end of the traceback that Serve quotes; the whole message, in one line, where there is none."""
    found = [match for line in message.splitlines() if (match := ERROR_LINE.match(line.strip()))]
    if not found:
        return " ".join(message.split())[:500]
    kind, text = found[-1].groups()
    return text if kind.endswith(("Error", "Adapter", "Unavailable", "Mismatch", "Rows")) else f"{kind}: {text}"


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    reason = ""
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(f"{url}/readyz", timeout=READY_SECONDS / 2, trust_env=takes_proxy(url))
            if answer.status_code == 200:
                return
            reason = str(answer.json()["error"]["message"])
        except httpx.TransportError:
            reason = "nothing answers there. Another program may have the port, or Serve listens elsewhere: serve shutdown"
        except (ValueError, KeyError, TypeError):
            reason = "what answers there is not LoRAFleet"
        time.sleep(POLL_SECONDS)
    raise LoRAFleetError(f"the endpoint {url} is up, and not ready: {reason}")


def command(config: ConfigOption = None, overrides: SetOption = [], state: StateOption = None) -> None:
    """Deploy the endpoint on the running Ray cluster, and print its URL."""
    typer.echo(deploy(settings_from(config, overrides, state)))
    ray.shutdown()


def main() -> None:
    """The entry of `python -m serve.deploy`."""
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    application.command()(command)
    run(lambda: application())


if __name__ == "__main__":
    main()
