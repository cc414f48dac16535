"""The files for Ray's cluster launcher: taken by Ray's own validator, and their commands by the shell that will run them."""

import copy
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

ROOT = Path(__file__).parents[2]
FILES = ["cluster.yaml", "clusters/local.yaml"]
SCRIPTS = sorted((ROOT / "clusters").glob("*.sh"))


def read(name):
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("name", FILES)
def test_rays_validator_takes_it_and_refuses_what_it_does_not_know(name):
    config = read(name)
    validate_config(prepare_config(copy.deepcopy(config)))
    for slip in ({**config, "max_worker": 1}, {**config, "auth": {**config["auth"], "ssh_usr": "me"}}):
        with pytest.raises(jsonschema.ValidationError):
            validate_config(prepare_config(slip))


def test_machines_are_bounded_and_the_head_holds_the_index_on_a_volume_that_stays():
    config = prepare_config(read("cluster.yaml"))
    kinds = config["available_node_types"]
    assert kinds.keys() == {"head", "cpu", "gpu"}
    workers = [kinds[kind] for kind in ("cpu", "gpu")]
    assert all(0 <= worker["min_workers"] <= worker["max_workers"] for worker in workers)
    assert sum(worker["max_workers"] for worker in workers) == config["max_workers"]
    (volume,) = [
        disk["Ebs"] for disk in kinds["head"]["node_config"]["BlockDeviceMappings"] if disk["DeviceName"] != "/dev/sda1"
    ]
    assert volume["DeleteOnTermination"] is False


@pytest.mark.parametrize("name", FILES)
def test_every_node_has_the_package_and_the_one_state_and_index(name):
    config = prepare_config(read(name))
    for role in ("head", "worker"):
        assert f"bash ~/lorafleet/clusters/install.sh {role}" in config[f"{role}_setup_commands"]
        assert not any("ray-wheels" in command for command in config[f"{role}_setup_commands"]), (
            "Ray's default is another Ray"
        )
        start = " ".join(config[f"{role}_start_ray_commands"])
        assert "LORAFLEET_INDEX__URL=http://" in start and ":8100;" in start
    assert config["file_mounts"]["~/lorafleet"] == "."
    for command in [text for key, texts in config.items() if key.endswith("_commands") for text in texts]:
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0, command


def test_scripts_are_shell_and_chroma_is_started_again_whenever_it_ends():
    assert len(SCRIPTS) == 3
    for script in SCRIPTS:
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    unit = (ROOT / "clusters" / "chroma@.service").read_text()
    assert "Restart=always" in unit and "--path /var/lib/chroma/data" in unit


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here to ask")
def test_systemd_takes_the_unit(tmp_path):
    unit = tmp_path / "chroma@somebody.service"
    text = (ROOT / "clusters" / "chroma@.service").read_text()
    for broken in (False, True):
        unit.write_text(text.replace("Restart=always", "Restart=ever") if broken else text)
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False)
        assert (unit.name in done.stderr) == broken, done.stderr


def test_the_runtime_environment_of_jobs_is_one_that_ray_knows():
    environment = read("clusters/job.yaml")
    assert environment.keys() <= RuntimeEnv.known_fields
    RuntimeEnv(**environment)
    assert all((ROOT / folder).exists() for folder in environment["excludes"])
