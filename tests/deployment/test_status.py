"""What `lorafleet status` makes of what a dashboard tells, in the words of Ray's own models."""

import pytest
from ray.serve.schema import DeploymentDetails, DeploymentSchema, ReplicaDetails

from lorafleet.cli.dashboard import APPLICATION, Cluster, Node, dashboard_url, deployments_of, load_of
from lorafleet.cli.status import Findings
from lorafleet.config import load_settings
from serve.app import APPLICATION as DEPLOYED

METRICS = """\
# TYPE ray_serve_deployment_queued_queries gauge
ray_serve_deployment_queued_queries{application="lorafleet",deployment="Generator",handle="a",actor_id="1"} 3.0
ray_serve_deployment_queued_queries{application="lorafleet",deployment="Generator",handle="b",actor_id="2"} 4.0
ray_serve_deployment_queued_queries{application="another",deployment="Generator",handle="c",actor_id="3"} 9.0
# TYPE ray_serve_replica_processing_queries gauge
ray_serve_replica_processing_queries{application="lorafleet",deployment="Generator",replica="x"} 16.0
"""


def details(name, states, wanted, status="HEALTHY", message=""):
    """A deployment as the dashboard tells of it."""
    replicas = [
        ReplicaDetails(replica_id=f"{name}{number}", state=state, start_time_s=0) for number, state in enumerate(states)
    ]
    return DeploymentDetails(
        name=name,
        status=status,
        status_trigger="CONFIG_UPDATE_COMPLETED",
        message=message,
        deployment_config=DeploymentSchema(name=name),
        target_num_replicas=wanted,
        required_resources={},
        replicas=replicas,
    ).model_dump(mode="json", exclude={"deployment_config"})


def findings(**changes):
    healthy = deployments_of({"Gateway": details("Gateway", ["RUNNING"], 1)}, {})
    cluster = Cluster("http://head:8265", (Node("10.0.0.1", True, "ALIVE", 8, 0, 32),), "RUNNING", healthy)
    known = {"endpoint": "http://head:8000", "chroma": "http://head:8100", "cluster": cluster, "no_cluster": ""}
    return Findings(**{**known, "rows": {"piqa": 100}, "adapters": 1, **changes})


def test_replicas_and_queues_are_counted_by_deployment():
    rows = {
        "Generator": details("Generator", ["RUNNING", "STARTING", "RUNNING"], 3, "UPSCALING", "waiting for\n 1 GPU"),
        "Weigher": details("Weigher", ["RUNNING"], 1),
    }
    generator, weigher = deployments_of(rows, load_of([METRICS, ""]))
    assert (generator.running, generator.wanted, generator.queued, generator.in_flight) == (2, 3, 7, 16)
    assert (weigher.running, weigher.queued, weigher.in_flight) == (1, None, None), "what nobody tells is not 0"
    assert generator.message == "waiting for 1 GPU"
    assert APPLICATION == DEPLOYED


def test_all_is_well_without_a_fault_and_every_part_that_is_away_is_one():
    assert list(findings().faults()) == []
    growing = deployments_of({"Generator": details("Generator", ["RUNNING", "STARTING"], 2, "UPSCALING")}, {})
    gone = Node("10.0.0.3", False, "DEAD", 8, 1, 32)
    at_work = Cluster("http://head:8265", (findings().cluster.nodes[0], gone), "RUNNING", growing)
    assert list(findings(cluster=at_work).faults()) == [], "autoscaling is no fault, nor a node that was taken away"
    ill = deployments_of({"Generator": details("Generator", ["STARTING"], 1, "UNHEALTHY", "no GPU")}, {})
    dead = Node("10.0.0.2", False, "DEAD", 8, 1, 32)
    cluster = Cluster("http://head:8265", (dead,), "DEPLOYING", ill)
    assert list(findings(cluster=cluster, chroma=None, endpoint=None).faults()) == [
        "no Chroma server answers at index.url",
        "Generator is unhealthy, 0 of 1 replicas run: no GPU",
        "the endpoint does not answer, or is not ready",
    ]
    assert list(findings(cluster=None, no_cluster="no Ray dashboard answers").faults()) == ["no Ray dashboard answers"]
    (undeployed,) = findings(cluster=Cluster("http://head:8265", (), None, ())).faults()
    assert undeployed.startswith("the application is not deployed")


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({}, "http://127.0.0.1:8265"),
        ({"RAY_ADDRESS": "auto"}, "http://127.0.0.1:8265"),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, "http://10.0.0.1:8265"),
        ({"RAY_ADDRESS": "ray://10.0.0.1:10001"}, "http://10.0.0.1:8265"),
        ({"RAY_ADDRESS": "10.0.0.1:6379", "RAY_API_SERVER_ADDRESS": "http://head:80/"}, "http://head:80"),
    ],
)
def test_the_dashboard_is_where_rays_own_commands_look(variables, url, monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert dashboard_url(load_settings()) == url
