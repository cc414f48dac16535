"""What runs on a Ray cluster, as its dashboard tells over HTTP: the library needs no Ray to look."""

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from lorafleet.config import Settings
from lorafleet.errors import LoRAFleetError
from lorafleet.network import takes_proxy
from lorafleet.ray_token import read_token

APPLICATION = "lorafleet"
NODES = "/api/v0/nodes?limit=1000"
APPLICATIONS = "/api/serve/applications/"
EXPORTERS = "/api/prometheus/sd"
QUEUED = "ray_serve_deployment_queued_queries"
RUNNING = "ray_serve_replica_processing_queries"
PATIENCE_SECONDS = 15.0
EXPORTER_SECONDS = 5.0


@dataclass(frozen=True)
class Node:
    """A machine of the cluster.

    Attributes:
        state: ALIVE; or DEAD for one that was there once, and has gone or been taken away.
    """

    address: str
    head: bool
    state: str
    cpus: float
    gpus: float
    memory_gib: float


@dataclass(frozen=True)
class Deployment:
    """A part of the endpoint.

    Attributes:
        status: Serve's word: HEALTHY, or what it is about.
        running: replicas that answer.
        wanted: replicas that there should be.
        in_flight: requests that they work on; None where no exporter tells.
        queued: requests that wait for a replica.
        message: why it is not healthy.
    """

    name: str
    status: str
    running: int
    wanted: int
    in_flight: int | None
    queued: int | None
    message: str


@dataclass(frozen=True)
class Cluster:
    """What a dashboard tells.

    Attributes:
        status: Serve's word for the whole application; None where there is none.
    """

    url: str
    nodes: tuple[Node, ...]
    status: str | None
    deployments: tuple[Deployment, ...]


def dashboard_url(settings: Settings) -> str:
    """Where the dashboard is: as Ray's own commands are told, beside RAY_ADDRESS, or on this machine."""
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS", "RAY_ADDRESS"):
        address = os.environ.get(variable, "")
        if address.startswith("http"):
            return address.rstrip("/")
    host = os.environ.get("RAY_ADDRESS", "").partition("://")[2] or os.environ.get("RAY_ADDRESS", "")
    host = host.rpartition(":")[0] if host not in ("", "auto", "local") else "127.0.0.1"
    return f"http://{host}:{settings.serving.dashboard_port}"


def look(settings: Settings) -> Cluster:
    """Look at the cluster.

    Raises:
        LoRAFleetError: no dashboard answers, or it refuses.
    """
    url = dashboard_url(settings)
    with httpx.Client(
        base_url=url, headers=_token_headers(), timeout=PATIENCE_SECONDS, trust_env=takes_proxy(url)
    ) as client:
        listed, details, exporters = (_asked(client, path) for path in (NODES, APPLICATIONS, EXPORTERS))
    try:
        nodes = tuple(map(node_of, listed["data"]["result"]["result"]))
        application = details["applications"].get(APPLICATION)
        load = load_of([_metrics(target) for exporter in exporters for target in exporter["targets"]])
        deployments = deployments_of(application["deployments"], load) if application else ()
    except (KeyError, TypeError, AttributeError):
        raise LoRAFleetError(
            f"what answers at {url} is not the dashboard of a Ray that is known here", "Set serving.dashboard_port to Ray's"
        ) from None
    return Cluster(url, nodes, application["status"] if application else None, deployments)


def node_of(row: Mapping[str, Any]) -> Node:
    """A node as the dashboard lists it."""
    resources = row["resources_total"] or {}
    memory = resources.get("memory", 0) / 2**30
    return Node(row["node_ip"], row["is_head_node"], row["state"], resources.get("CPU", 0), resources.get("GPU", 0), memory)


def deployments_of(rows: Mapping[str, Mapping[str, Any]], load: Mapping[str, Mapping[str, int]]) -> tuple[Deployment, ...]:
    """The deployments as the dashboard details them.

    Args:
        load: by metric and deployment (`load_of`).
    """
    return tuple(
        Deployment(
            name,
            row["status"],
            sum(replica["state"] == "RUNNING" for replica in row["replicas"]),
            row["target_num_replicas"],
            load.get(RUNNING, {}).get(name),
            load.get(QUEUED, {}).get(name),
            " ".join(str(row["message"]).split()),
        )
        for name, row in rows.items()
    )


def load_of(texts: list[str]) -> dict[str, dict[str, int]]:
    """Requests by metric and deployment, summed over replicas and handles, from what exporters offer to Prometheus."""
    load: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples if family.name in (QUEUED, RUNNING) else ():
                if sample.labels.get("application") == APPLICATION:
                    load[family.name][sample.labels["deployment"]] += int(sample.value)
    return load


def _asked(client: httpx.Client, path: str) -> Any:
    try:
        reply = client.get(path)
    except (httpx.HTTPError, httpx.InvalidURL):
        raise LoRAFleetError(
            f"no Ray dashboard answers at {client.base_url}",
            "Start the cluster: lorafleet up, or name it in RAY_API_SERVER_ADDRESS",
        ) from None
    if reply.status_code in (401, 403):
        raise LoRAFleetError(
            f"the Ray cluster at {client.base_url} wants its token",
            "Put it into ~/.ray/auth_token, or name its file in RAY_AUTH_TOKEN_PATH",
        )
    try:
        return reply.raise_for_status().json()
    except (httpx.HTTPStatusError, ValueError):
        raise LoRAFleetError(
            f"the Ray dashboard at {client.base_url} answers {path} with status {reply.status_code}",
            "Read dashboard.log in Ray's logs (/tmp/ray/session_latest/logs)",
        ) from None


def _metrics(target: str) -> str:
    """What an exporter offers; nothing where it cannot be reached from here, as on the private network of a cloud."""
    try:
        # The cluster's own network is no proxy's business.
        reply = httpx.get(f"http://{target}/metrics", timeout=EXPORTER_SECONDS, trust_env=False)
        return reply.text if reply.is_success else ""
    except (httpx.HTTPError, httpx.InvalidURL):
        return ""


def _token_headers() -> dict[str, str]:
    token = read_token()
    return {"Authorization": f"Bearer {token}"} if token else {}
