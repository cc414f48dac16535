"""The Kubernetes manifests: by their kinds' schemas, strictly, and by what the fleet needs of them."""

import copy
import re
from pathlib import Path

import pytest
import yaml
from deployment.manifests import FOLDER, kind_faults, manifests, pod_specs

from lorafleet.config import load_settings

ROOT = Path(__file__).parents[2]
MANIFESTS = manifests()
NAMES = [f"{file}:{document['kind']}" for file, document in MANIFESTS]
PODS = list(pod_specs())


def by_kind(kind):
    return [document for _, document in MANIFESTS if document["kind"] == kind]


@pytest.mark.parametrize("document", [document for _, document in MANIFESTS], ids=NAMES)
def test_its_schema_takes_it_and_refuses_a_slip_of_the_pen(document):
    assert kind_faults(document) == []
    slipped = copy.deepcopy(document)
    if "spec" in document:
        slipped["spec"]["replica"] = 1
    else:
        slipped["metadata"]["label"] = {}
    assert kind_faults(slipped) != []


@pytest.mark.parametrize("file", ["rayservice.yaml", "jobs/train.yaml"])
def test_a_slip_deep_in_a_pod_is_found_too(file):
    (document,) = [document for name, document in MANIFESTS if name == file]
    slipped = copy.deepcopy(document)
    spec = slipped["spec"]
    cluster = spec.get("rayClusterConfig") or spec["rayClusterSpec"]
    cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["readinessProbe"]["periodSecond"] = 5
    assert any("periodSecond" in fault for fault in kind_faults(slipped))


@pytest.mark.parametrize("pod", [pod for _, pod in PODS], ids=[name for name, _ in PODS])
def test_every_container_is_bounded_watched_and_without_privileges(pod):
    assert pod["securityContext"]["runAsNonRoot"] is True
    for container in pod["containers"]:
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert not container["image"].endswith(":latest") and ":" in container["image"]
        if container["name"] != "ray-job-submitter":
            assert "livenessProbe" in container
    if pod["containers"][0]["name"] != "ray-job-submitter":
        assert any("readinessProbe" in container for container in pod["containers"])


def test_secrets_are_referred_to_and_the_keys_have_to_be_there():
    text = "\n".join(path.read_text() for path in FOLDER.rglob("*.yaml"))
    assert not by_kind("Secret") and not re.search(r"(hf_|lf-)[A-Za-z0-9]{8}", text)
    for name, pod in PODS:
        for container in pod["containers"]:
            for variable in container.get("env", []):
                assert "TOKEN" not in variable["name"] or "secretKeyRef" in variable["valueFrom"], name
    (service,) = by_kind("RayService")
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (keys,) = [volume["secret"] for volume in group["template"]["spec"]["volumes"] if volume["name"] == "keys"]
        assert not keys.get("optional"), "without its keys the endpoint would be open to all"


def test_ray_asks_for_its_token_and_its_version_is_the_one_that_was_tested():
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    for document in (*by_kind("RayService"), *by_kind("RayJob")):
        cluster = document["spec"].get("rayClusterConfig") or document["spec"]["rayClusterSpec"]
        assert (cluster["rayVersion"], cluster["authOptions"]["mode"]) == (pinned[1], "token")


def test_names_in_one_manifest_are_those_of_another_and_of_the_settings():
    settings = load_settings(ROOT / "configs" / "fleet.yaml")
    (claim,), (service,), (chroma,) = by_kind("PersistentVolumeClaim"), by_kind("Service"), by_kind("StatefulSet")
    assert settings.index.url == f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert service["spec"]["selector"].items() <= chroma["spec"]["template"]["metadata"]["labels"].items()
    labels = [document["spec"] for _, document in MANIFESTS if document["kind"].startswith("Ray")]
    assert str(settings.state) in str(labels)
    for name, pod in PODS:
        for volume in pod.get("volumes", []):
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"], name
    (network,) = [policy for policy in by_kind("NetworkPolicy") if policy["metadata"]["name"] == "chroma"]
    assert network["spec"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": service["spec"]["ports"][0]["port"]}]


def test_each_disruption_budget_bounds_pods_that_there_are():
    labels = [document["spec"]["template"]["metadata"]["labels"] for document in by_kind("StatefulSet")]
    cluster = by_kind("RayService")[0]["spec"]["rayClusterConfig"]
    labels += [group["template"]["metadata"]["labels"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    budgets = by_kind("PodDisruptionBudget")
    assert len(budgets) == 3
    for budget in budgets:
        wanted = budget["spec"]["selector"]["matchLabels"].items()
        assert any(wanted <= pod.items() for pod in labels), budget["metadata"]["name"]


def test_kustomize_takes_all_files_but_the_jobs():
    listed = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted(path.name for path in FOLDER.glob("*.yaml") if path.name != "kustomization.yaml")


@pytest.mark.parametrize("job", sorted((FOLDER / "jobs").glob("*.yaml")), ids=lambda path: path.stem)
def test_each_job_runs_a_module_of_this_repository(job):
    words = yaml.safe_load(job.read_text())["spec"]["entrypoint"].split()
    assert words[:2] == ["python", "-m"] and (ROOT / f"{words[2].replace('.', '/')}.py").is_file()
    assert (ROOT / Path(words[words.index("--config") + 1]).relative_to("/opt/lorafleet")).is_file()
