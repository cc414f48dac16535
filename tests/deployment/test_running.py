"""The whole fleet by its commands: up, status, a request that every log knows, new settings under way, down."""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import httpx
import pytest
import yaml
from small_fleet import fill, free_port, small_settings

from lorafleet.retrieval import server

pytestmark = [pytest.mark.integration, pytest.mark.drill]

LORAFLEET = Path(sys.executable).with_name("lorafleet")
QUESTION = {"model": "auto", "prompt": "How long does an egg boil?", "max_tokens": 4, "temperature": 0}
PARTS = {"Gateway", "Retriever", "Weigher", "Generator"}


@pytest.fixture
def fleet(tmp_path, monkeypatch):
    """A command line for a small fleet with its own cluster, which is down again afterwards; and the settings' file."""
    # Sockets want a short path, and other clusters of this machine their own note of where they are.
    with tempfile.TemporaryDirectory(prefix="lf", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        monkeypatch.setenv("RAY_TMPDIR", ray_folder)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        ports = {name: free_port() for name in ("port", "ray_port", "dashboard_port")}
        settings = small_settings(tmp_path, free_port(), **ports)
        file = tmp_path / "fleet.yaml"
        chosen = settings.model_dump(mode="json", include={"state", "models", "index", "generation", "serving"})
        file.write_text(yaml.safe_dump({**chosen, "logging": {"encoding": "json", "traces": "file", "traced_share": 1}}))

        def run(*arguments):
            command = [LORAFLEET, *arguments, "--config", file]
            return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

        try:
            server.start(settings)
            fill(settings)
            yield run, file, settings
        finally:
            run("down")
            server.stop(settings)


def asking(url, right, wrong, over):
    """Ask until it is over, and note what was answered, and what was not."""
    with httpx.Client(timeout=60) as client:
        while not over.wait(0.1):
            answer = client.post(f"{url}/v1/completions", json=QUESTION)
            (right if answer.status_code == 200 else wrong).append(answer.text)


def records(ray_folder):
    """Every line of JSON of the deployments' logs."""
    for log in Path(ray_folder).rglob("logs/serve/replica_*.log"):
        yield from map(json.loads, log.read_text().splitlines())


def traces(ray_folder):
    """The trace of each span, by the deployment whose span it is."""
    found = {part: set() for part in PARTS}
    for spans in Path(ray_folder).rglob("logs/serve/spans/*"):
        for part in PARTS:
            if f"lorafleet_{part}" in spans.name:
                found[part] |= set(re.findall(r'"trace_id": "(0x[0-9a-f]{32})"', spans.read_text()))
    return found


def test_a_fleet_by_its_commands(fleet):
    run, file, settings = fleet
    url = f"http://127.0.0.1:{settings.serving.port}"
    up = run("up")
    assert up.returncode == 0, up.stderr

    looked = run("status", "--json")
    found = json.loads(looked.stdout)
    assert (looked.returncode, found["faults"], found["application"]) == (0, [], "RUNNING")
    assert {row["name"]: (row["running"], row["wanted"]) for row in found["deployments"]} == dict.fromkeys(
        [*PARTS, "Pool"], (1, 1)
    )
    assert [(node["head"], node["state"]) for node in found["nodes"]] == [(True, "ALIVE")]
    assert (found["adapters"], found["endpoint"]) == (2, url)

    told = [record["message"] for record in records(os.environ["RAY_TMPDIR"]) if "was loaded in" in record["message"]]
    assert any("base with 2 adapters, in float32 on cpu" in message for message in told), told
    assert any("on cpu; serving.retriever.gpus is 0" in message for message in told), told

    answer = httpx.post(f"{url}/v1/completions", json=QUESTION, headers={"X-Request-Id": "egg-1"}, timeout=60)
    assert (answer.status_code, answer.headers["X-Request-Id"]) == (200, "egg-1")
    mine = [record for record in records(os.environ["RAY_TMPDIR"]) if record.get("request_id") == "egg-1"]
    assert {record["deployment"] for record in mine} == {f"lorafleet_{part}" for part in PARTS}
    assert all(record["replica"] and record["application"] == "lorafleet" for record in mine)
    assert set.intersection(*traces(os.environ["RAY_TMPDIR"]).values()), "one trace goes through all deployments"

    right, wrong, over = [], [], threading.Event()
    client = threading.Thread(target=asking, args=(url, right, wrong, over), daemon=True)
    client.start()
    written = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**written, "generation": {**written["generation"], "max_tokens": 9}}))
    again = run("up")
    over.set()
    client.join()
    assert (again.returncode, wrong) == (0, []), again.stderr
    assert right
    unbounded = {key: value for key, value in QUESTION.items() if key != "max_tokens"}
    longer = httpx.post(f"{url}/v1/completions", json=unbounded, timeout=60).json()
    assert longer["usage"]["completion_tokens"] == 9, "the new settings hold"
    assert run("down").stdout == "Stopped: endpoint and Ray head, Chroma server\n"
