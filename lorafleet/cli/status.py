"""lorafleet status: what runs, what the fleet holds, and what is missing."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import typer

from lorafleet.cli.dashboard import Cluster, Node, look
from lorafleet.cli.endpoint import endpoint_url
from lorafleet.cli.options import ConfigOption, JsonOption, SetOption, StateOption, settings_from
from lorafleet.cli.output import print_json, print_table
from lorafleet.cli.service import endpoint_ready
from lorafleet.config import Settings
from lorafleet.errors import LoRAFleetError

FAILED = ("UNHEALTHY", "DEPLOY_FAILED")
"""Serve's words for what does not mend itself by waiting; the others are about replicas that come and go."""


@dataclass(frozen=True)
class Findings:
    """What runs.

    Attributes:
        endpoint: its URL; None where it does not answer, or is not ready.
        chroma: the URL of the server; None where none answers.
        cluster: None where there is none.
        no_cluster: why not.
        rows: of the index, by task.
        adapters: in storage.
    """

    endpoint: str | None
    chroma: str | None
    cluster: Cluster | None
    no_cluster: str
    rows: dict[str, int]
    adapters: int

    def faults(self) -> Iterator[str]:
        """What should run and does not, a line each."""
        if self.chroma is None:
            yield "no Chroma server answers at index.url"
        if self.cluster is None:
            yield self.no_cluster
        else:
            yield from _faults_of(self.cluster)
        if self.endpoint is None:
            yield "the endpoint does not answer, or is not ready"


def status(
    config: ConfigOption = None,
    overrides: SetOption = [],
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """What runs, and what the fleet holds; exit code 1 where something does not run."""
    settings = settings_from(config, overrides, state)
    found = examine(settings)
    faults = list(found.faults())
    if as_json:
        print_json(_as_data(found, settings, faults))
    else:
        _print(found, settings)
        for fault in faults:
            typer.echo(f"FAULT  {fault}")
    if faults:
        raise typer.Exit(1)


def examine(settings: Settings) -> Findings:
    """Look everywhere."""
    from lorafleet.adapters import stored_adapters
    from lorafleet.retrieval import read_manifest, server

    manifest = read_manifest(settings.state / "index.json")
    cluster, no_cluster = None, ""
    try:
        cluster = look(settings)
    except LoRAFleetError as error:
        no_cluster = str(error)
    return Findings(
        endpoint=endpoint_url(settings) if endpoint_ready(settings) else None,
        chroma=settings.index.url if server.answers(settings.index) else None,
        cluster=cluster,
        no_cluster=no_cluster,
        rows=dict(manifest.rows) if manifest else {},
        adapters=len(stored_adapters(settings).adapters),
    )


def _faults_of(cluster: Cluster) -> Iterator[str]:
    if cluster.status is None:
        yield "the application is not deployed: lorafleet up, or serve deploy serve/config.yaml"
    for deployment in cluster.deployments:
        if deployment.status in FAILED or (deployment.wanted and not deployment.running):
            reason = f": {deployment.message}" if deployment.message else ""
            yield (
                f"{deployment.name} is {deployment.status.lower()}, "
                f"{deployment.running} of {deployment.wanted} replicas run{reason}"
            )


def _as_data(found: Findings, settings: Settings, faults: list[str]) -> dict[str, Any]:
    cluster = found.cluster
    return {
        "endpoint": found.endpoint,
        "ray": cluster.url if cluster else None,
        "chroma": found.chroma,
        "indexed_rows": sum(found.rows.values()),
        "indexed_tasks": len(found.rows),
        "adapters": found.adapters,
        "state": str(settings.state),
        "nodes": [asdict(node) for node in cluster.nodes] if cluster else [],
        "application": cluster.status if cluster else None,
        "deployments": [asdict(deployment) for deployment in cluster.deployments] if cluster else [],
        "faults": faults,
    }


def _print(found: Findings, settings: Settings) -> None:
    cluster = found.cluster
    parts = [
        ("Chroma", found.chroma or "not running"),
        ("index", f"{sum(found.rows.values()):,} rows of {len(found.rows)} tasks"),
        ("adapters", f"{found.adapters} in {settings.adapters}"),
        ("Ray", f"{len(_alive(cluster))} nodes, dashboard {cluster.url}" if cluster else "not running"),
        ("endpoint", found.endpoint or "not running"),
    ]
    print_table(["part", "status"], parts)
    if cluster is None:
        return
    typer.echo()
    print_table(
        ["node", "role", "CPUs", "GPUs", "memory"],
        [
            (
                node.address,
                "head" if node.head else "worker",
                f"{node.cpus:g}",
                f"{node.gpus:g}",
                f"{node.memory_gib:.1f} GiB",
            )
            for node in _alive(cluster)
        ],
    )
    if cluster.deployments:
        typer.echo()
        print_table(
            ["deployment", "status", "replicas", "in flight", "queued"],
            [
                (
                    deployment.name,
                    deployment.status.lower(),
                    f"{deployment.running} of {deployment.wanted}",
                    _count(deployment.in_flight),
                    _count(deployment.queued),
                )
                for deployment in cluster.deployments
            ],
        )


def _alive(cluster: Cluster) -> list[Node]:
    return [node for node in cluster.nodes if node.state == "ALIVE"]


def _count(number: int | None) -> str:
    return "-" if number is None else str(number)
