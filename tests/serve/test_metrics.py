"""What Ray's own exporter offers to Prometheus, and the dashboard that reads it."""

import json
import re
import time
from collections import defaultdict
from pathlib import Path

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from serve.metrics import DISTANCES, TASKS, absolute_shares

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "dashboards" / "lorafleet.json"
QUESTION = "The man turned on the faucet. What happened as a RESULT? As a result, the water"
PATIENCE_SECONDS = 60
# Longer than the second between two reports of Ray's workers (conftest.py), on a busy machine.
SETTLING_SECONDS = 5
PREFIX = "ray_lorafleet_"

Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]


def scrape() -> Samples:
    """Every sample of our replicas by name and labels, from this node's exporter; other tests' engines have no replica."""
    (node,) = ray.nodes()
    text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text
    samples: Samples = defaultdict(dict)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(PREFIX) and sample.labels.get("replica"):
                samples[sample.name][tuple(sorted(sample.labels.items()))] = sample.value
    return samples


def total(samples: Samples, name: str, **labels: str) -> float:
    wanted = labels.items()
    return sum(value for key, value in samples.get(PREFIX + name, {}).items() if wanted <= dict(key).items())


@pytest.mark.integration
def test_requests_move_the_numbers_that_ray_exports(http):
    # What the tests before have done is reported first.
    time.sleep(SETTLING_SECONDS)
    before = scrape()
    asked = {"prompt": QUESTION, "temperature": 0, "max_tokens": 4, "n": 2}
    auto = http.post("/v1/completions", json=asked).json()
    base = http.post("/v1/completions", json={**asked, "model": "base"}).json()
    weighted = {"weights": {"copa": -3, "wnli": 1}}
    explicit = http.post("/v1/completions", json={**asked, "composition": weighted}).json()
    refused = http.post("/v1/completions", json={**asked, "n": 0})
    routed = http.post("/v1/route", json={"input": QUESTION}).json()
    unlike = http.post("/v1/route", json={"input": "zzyzx 0x7f qwrtp"}).json()
    with http.stream("POST", "/v1/completions", json={**asked, "max_tokens": 64, "stream": True}) as stream:
        next(stream.iter_lines())
    http.get("/nowhere/1")
    http.get("/nowhere/2")
    assert refused.status_code == 400

    def moved(name: str, **labels: str) -> float:
        return total(after, name, **labels) - total(before, name, **labels)

    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        after = scrape()
        counts = {
            "answered": moved("requests_total", endpoint="/v1/completions", status="200"),
            "weighed": moved("nearest_neighbour_distance_count"),
            "first tokens": moved("first_token_seconds_count"),
            "hung up": moved("requests_total", endpoint="/v1/completions", status="499"),
            "unknown": moved("requests_total", endpoint="other", status="404"),
            "running": total(after, "rows_running"),
        }
        if counts == {"answered": 3, "weighed": 4, "first tokens": 6, "hung up": 1, "unknown": 2, "running": 0}:
            break
        assert time.monotonic() < deadline, counts
        time.sleep(1)

    assert moved("requests_total", endpoint="/v1/completions", status="400") == 1
    assert (
        moved("requests_total", endpoint="/v1/route", status="200")
        == moved("request_seconds_count", endpoint="/v1/route")
        == 2
    )
    for stage in ("retrieval", "weighing"):
        assert moved("stage_seconds_count", stage=stage) == 4
    for stage in ("queue", "first_token"):
        assert moved("stage_seconds_count", stage=stage) == 6
    answers = (auto, base, explicit)
    assert moved("output_tokens_total") == sum(answer["usage"]["completion_tokens"] for answer in answers)
    assert moved("prompt_tokens_total") == sum(answer["usage"]["prompt_tokens"] for answer in answers)
    # Ray knows of a histogram what lies below each of its bounds; its sums are only near.
    distances = [1 - route["neighbours"][0]["similarity"] for route in (routed, routed, routed, unlike)]
    sizes = [len(answer["weights"]) for answer in (auto["composition"], auto["composition"], routed, unlike)]
    for name, values, bounds in (
        ("nearest_neighbour_distance_bucket", distances, DISTANCES),
        ("nucleus_tasks_bucket", sizes, TASKS),
    ):
        assert [moved(name, le=str(float(bound))) for bound in bounds] == [
            sum(value <= bound for value in values) for bound in bounds
        ]
    assert max(distances) > 0.6 > min(distances)
    assert moved("base_answers_total") == 2
    for task, weight in {"copa": 0.75, "wnli": 0.25, "sst2": 0}.items():
        found = auto["composition"]["weights"].get(task, 0)
        assert moved("adapter_weight_total", task=task) == pytest.approx(weight + found, abs=1e-6)
    assert total(after, "adapters") == 3
    assert total(after, "rows") == 8
    assert total(after, "requests_waiting") == 0
    text = " ".join(value for series in after.values() for key in series for _, value in key)
    assert "faucet" not in text
    assert "nowhere" not in text


@pytest.mark.integration
def test_the_dashboard_asks_for_what_is_exported_and_for_all_of_it(http):
    """A query names metrics and labels that the exporter has: a renamed metric would leave a panel empty for good."""
    http.post("/v1/completions", json={"prompt": QUESTION, "max_tokens": 1}).raise_for_status()
    http.post("/v1/completions", json={"prompt": QUESTION, "max_tokens": 1, "model": "base"}).raise_for_status()
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked = {name for query in queries for name in re.findall(rf"\b{PREFIX}\w+", query)}
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (missing := asked - scrape().keys()) and time.monotonic() < deadline:
        time.sleep(1)
    exported = scrape()

    assert len(queries) >= 15
    assert missing == set()
    family = re.compile(r"_(bucket|count|sum)$")
    assert {family.sub("", name) for name in exported} == {family.sub("", name) for name in asked}
    for query in queries:
        names = re.findall(rf"\b{PREFIX}\w+", query)
        labels = {label for name in names for key in exported[name] for label, _ in key}
        used = set(re.findall(r"(\w+)\s*(?:=~|!=|=)\s*\"", query))
        grouped = {label for group in re.findall(r"\bby \(([^)]*)\)", query) for label in group.split(", ")}
        assert used | grouped <= labels, query
        assert query.count("(") == query.count(")")
        assert query.count("{") == query.count("}")


def test_the_dashboard_is_one_that_grafana_provisions():
    dashboard = json.loads(DASHBOARD.read_text())
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(identifiers)) == len(identifiers)
    assert dashboard["uid"]
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(dashboard))) <= variables
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        if panel["type"] != "row":
            assert panel["description"].endswith(".")
            assert panel["datasource"]["uid"] == "${datasource}"


def test_shares_sum_to_one_whatever_the_weights():
    assert absolute_shares({"copa": -3, "wnli": 1, "sst2": 0}) == {"copa": 0.75, "wnli": 0.25}
    assert absolute_shares({}) == absolute_shares({"copa": 0}) == {}
