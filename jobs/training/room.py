"""The room that the cluster has for worker groups."""

from collections.abc import Mapping
from dataclasses import dataclass

import ray
import torch

from lorafleet.config import Training
from lorafleet.training import checks

# A third of a GPU, three times, is a whole one.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Node:
    """A node of the cluster that lives: its resources in Ray's units, and how many workers find room there."""

    identifier: str
    address: str
    resources: Mapping[str, float]
    workers: int


def worker_resources(training: Training) -> dict[str, float]:
    """What a worker takes of its node."""
    gpu = {"GPU": training.gpus_per_worker} if training.gpus_per_worker else {}
    return {"CPU": training.cpus_per_worker, **gpu}


def nodes(training: Training) -> list[Node]:
    """The nodes that are in the cluster now."""
    return [
        Node(
            identifier=node["NodeID"],
            address=node["NodeManagerAddress"],
            resources=node["Resources"],
            workers=_fitting(node["Resources"], worker_resources(training)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def groups_in_all(training: Training) -> int:
    """How many worker groups the cluster has room for, as far as the settings allow."""
    workers = sum(node.workers for node in nodes(training))
    return min(training.workers or workers, workers) // training.workers_per_adapter


def groups_now(training: Training) -> int:
    """How many more groups find room beside all that runs now."""
    return _fitting(ray.available_resources(), worker_resources(training)) // training.workers_per_adapter


def room_faults(training: Training) -> list[str]:
    """The cluster has no room for a single group."""
    if groups_in_all(training) >= 1:
        return []
    there, wanted = ray.cluster_resources(), worker_resources(training)
    return [
        f"{training.workers_per_adapter} workers of {_named(wanted)} each find no room in a cluster of"
        f" {_named({name: there.get(name, 0) for name in ('CPU', 'GPU')})}."
        " Lower training.cpus_per_worker, training.gpus_per_worker or training.workers_per_adapter, or join a larger cluster"
    ]


def memory_faults(training: Training, at_once: int, needed: int) -> list[str]:
    """Nodes, or GPUs, whose memory does not hold the base models of the workers that they will have.

    Args:
        at_once: how many workers there will be in all.
        needed: bytes a worker. Where workers have GPUs it is these that hold the models, and all are taken to be like the
            first of this machine; where it has none, nothing is said.
    """
    if training.gpus_per_worker:
        if not torch.cuda.is_available():
            return []
        memory = torch.cuda.get_device_properties(0).total_memory
        return checks.memory_faults("a GPU", memory, max(1, _fitting({"GPU": 1}, {"GPU": training.gpus_per_worker})), needed)
    faults = []
    for node in nodes(training):
        if "memory" in node.resources:
            workers = min(node.workers, at_once)
            faults += checks.memory_faults(f"node {node.address}", int(node.resources["memory"]), workers, needed)
    return faults


def _fitting(resources: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    return int(min(resources.get(name, 0) / amount for name, amount in wanted.items()) + ROUNDING)


def _named(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
