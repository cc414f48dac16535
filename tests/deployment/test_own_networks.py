"""Three nodes, each in a network of its own: work reaches them by their addresses, and one that is cut off comes back."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import socket, threading, time
import ray
from benchmarks.nodes import joined

with joined({"num_cpus": 1}, True, {}) as nodes:
    cpu, gpu = nodes.add({"num_cpus": 1}), nodes.add({"num_cpus": 1, "num_gpus": 1})
    deadline = time.monotonic() + 60
    while len(ray.nodes()) < 3 and time.monotonic() < deadline:
        time.sleep(0.2)
    print({node["NodeManagerAddress"] for node in ray.nodes()})

    @ray.remote(num_gpus=1, num_cpus=0)
    def own():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("10.77.0.2", 9))
            return probe.getsockname()[0]

    print("on the GPU node:", ray.get(own.remote()))
    away = threading.Thread(target=nodes.cut, args=(gpu, 6))
    away.start()
    time.sleep(1)
    waiting = own.remote()
    print("while it is away:", len(ray.wait([waiting], timeout=3)[0]))
    print("afterwards:", ray.get(waiting, timeout=60))
    away.join()
"""


def possible() -> bool:
    """Whether this machine lets us make networks."""
    programs = all(shutil.which(name) for name in ("ip", "nsenter", "unshare"))
    return programs and os.geteuid() == 0 and subprocess.run(["unshare", "--net", "true"], check=False).returncode == 0


@pytest.mark.drill
@pytest.mark.skipif(not possible(), reason="networks of their own need root, iproute2 and a kernel that has them")
def test_nodes_with_networks_of_their_own():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for expected in ("10.77.0.2", "10.77.0.3", "on the GPU node: 10.77.0.4", "while it is away: 0", "afterwards: 10.77.0.4"):
        assert expected in done.stdout
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert "lorafleet" not in left, "a network is left behind"
