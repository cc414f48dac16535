"""Nodes of a Ray cluster on one machine: all in its network, or each in a network of its own.

With networks of their own (network namespaces of Linux, joined by a bridge; root alone may make them) nodes reach each other
by their addresses only, as machines do, and one can be cut off while its processes live.
"""

import ctypes
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any, Protocol

import psutil
import ray
from ray.cluster_utils import Cluster

BRIDGE = "lorafleet"
SUBNET = "10.77.0"
PORT = 6399
CLONE_NEWNET = 0x40000000
START_SECONDS = 60.0
Resources = Mapping[str, float]


class Nodes(Protocol):
    """The nodes of a cluster, a head first. This process is a driver of it, on the head.

    Attributes:
        host: where the head listens for the others.
    """

    host: str

    def add(self, resources: Resources) -> Any:
        """One more node."""

    def kill(self, node: Any) -> None:
        """End a node with all that runs on it, without a word to anybody."""

    def processes(self) -> list[psutil.Process]:
        """What runs on all of them."""


class SharedNetwork:
    """Nodes in the network of this machine."""

    host = "127.0.0.1"

    def __init__(self, head: Resources) -> None:
        self._cluster = Cluster(initialize_head=True, head_node_args={**head, "include_dashboard": False})
        self.address = self._cluster.address

    def add(self, resources: Resources) -> Any:
        """As `Nodes.add`."""
        return self._cluster.add_node(**resources)

    def kill(self, node: Any) -> None:
        """As `Nodes.kill`."""
        self._cluster.remove_node(node, allow_graceful=False)

    def processes(self) -> list[psutil.Process]:
        """As `Nodes.processes`."""
        raylets = [
            psutil.Process(process.process.pid)
            for node in self._cluster.list_all_nodes()
            for process in node.all_processes.get("raylet", [])
        ]
        return [child for raylet in raylets for child in raylet.children(recursive=True)]

    def close(self) -> None:
        """End all of them."""
        self._cluster.shutdown()


@dataclass(frozen=True)
class OwnNode:
    """A node in its own network, and the process that keeps it up."""

    name: str
    process: "subprocess.Popen[bytes]"


@dataclass
class OwnNetworks:
    """Nodes in networks of their own. It brings this process into that of the head, for good.

    Raises:
        PermissionError: this process may not make networks.
    """

    head: Resources
    host: str = f"{SUBNET}.2"
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(2))
    _nodes: list[OwnNode] = field(default_factory=list)

    def __post_init__(self) -> None:
        if os.geteuid() != 0:
            raise PermissionError("networks of their own need root")
        self.address = f"{self.host}:{PORT}"
        _clear()
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("link", "set", BRIDGE, "up")
        try:
            node = self._start("--head", f"--port={PORT}", "--include-dashboard=false", resources=self.head)
            _enter(node.name)
        except BaseException:
            self.close()
            raise

    def add(self, resources: Resources) -> OwnNode:
        """As `Nodes.add`."""
        return self._start(f"--address={self.address}", resources=resources)

    def kill(self, node: OwnNode) -> None:
        """As `Nodes.kill`."""
        self._nodes.remove(node)
        for process in _family(node):
            process.kill()
        node.process.wait()
        _ip("netns", "delete", node.name)

    def cut(self, node: OwnNode, seconds: float) -> None:
        """Take a node off the bridge for so long; nobody is told."""
        _ip("netns", "exec", node.name, "ip", "link", "set", "eth0", "down")
        time.sleep(seconds)
        _ip("netns", "exec", node.name, "ip", "link", "set", "eth0", "up")

    def processes(self) -> list[psutil.Process]:
        """As `Nodes.processes`."""
        return [process for node in self._nodes for process in _family(node)]

    def close(self) -> None:
        """End all of them, and the bridge."""
        for node in list(self._nodes):
            self.kill(node)
        _clear()

    def _start(self, *how: str, resources: Resources) -> OwnNode:
        number = next(self._numbers)
        name, address = f"{BRIDGE}-{number}", f"{SUBNET}.{number}"
        _ip("netns", "add", name)
        _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", name, "master", BRIDGE, "up")
        for arguments in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            _ip("-n", name, *arguments.split())
        wanted = [f"--{kind.replace('_', '-')}={count:g}" for kind, count in resources.items()]
        ray_program = str(Path(sys.executable).with_name("ray"))
        command = ["ip", "netns", "exec", name, ray_program, "start", "--block", "--disable-usage-stats"]
        process = subprocess.Popen(
            [*command, *how, f"--node-ip-address={address}", *wanted],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Ray's own child processes would end with this program's Ctrl-C before they are asked to.
            start_new_session=True,
        )
        node = OwnNode(name, process)
        self._nodes.append(node)
        deadline = time.monotonic() + START_SECONDS
        while not any("raylet/raylet" in " ".join(_command(one)) for one in _family(node)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"node {name} has not come up")
            time.sleep(0.2)
        return node


@contextmanager
def joined(head: Resources, own_networks: bool, environment: Mapping[str, str]) -> "Iterator[SharedNetwork | OwnNetworks]":
    """A cluster with a head, which this process joins as a driver; everything of it is gone at the end.

    Args:
        environment: of all processes.
    """
    folder = tempfile.mkdtemp(prefix="drills")
    os.environ.update({**environment, "RAY_TMPDIR": folder})
    if own_networks:
        # Nobody but this machine reaches them; and this process, which has Ray loaded, could not take up a token any more.
        os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.pop("RAY_ADDRESS", None)
    nodes = OwnNetworks(head) if own_networks else SharedNetwork(head)
    try:
        ray.init(nodes.address, logging_level="ERROR", log_to_driver=False)
        yield nodes
    finally:
        ray.shutdown()
        nodes.close()
        shutil.rmtree(folder, ignore_errors=True)


def _family(node: OwnNode) -> list[psutil.Process]:
    try:
        process = psutil.Process(node.process.pid)
        return [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return []


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def _ip(*arguments: str) -> None:
    """A command of iproute2, in the network in which this program was started."""
    started_in = f"--net=/proc/{os.getpid()}/fd/{_outside().fileno()}"
    done = subprocess.run(["nsenter", started_in, "ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@cache
def _outside() -> IO[str]:
    return Path("/proc/self/ns/net").open()


def _clear() -> None:
    """Take away what a run that was killed has left."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    for name in (word for word in listed if word.startswith(f"{BRIDGE}-")):
        pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True).stdout.split()
        for pid in pids:
            if int(pid) != os.getpid():
                os.kill(int(pid), signal.SIGKILL)
        _ip("netns", "delete", name)
    with suppress(RuntimeError):
        _ip("link", "delete", BRIDGE)


def _enter(name: str) -> None:
    """Bring this process into a network; threads that it has already stay where they are."""
    with (Path("/run/netns") / name).open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
