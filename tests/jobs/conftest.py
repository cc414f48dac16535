"""A small cluster, and settings for small trainings of the tiny model."""

import shutil
import tempfile

import pytest
import ray
from ray.cluster_utils import Cluster
from tiny_language_model import write_tiny_model

from lorafleet.config import load_settings


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_settings(base, tmp_path):
    def make(tasks, steps=3, **training):
        recipe = {
            "rank": 4,
            "max_steps": steps,
            "learning_rate": 0.02,
            "warmup_steps": 1,
            "max_tokens": 96,
            "dtype": "float32",
        }
        return load_settings(
            state=tmp_path / "state",
            models={"base": str(base), "device": "cpu"},
            tasks=tasks,
            # One worker group is enough for most, and soon started.
            training={**recipe, "accumulation": 1, "workers": 1, **training},
        )

    return make


@pytest.fixture(scope="module")
def cluster():
    """A head of two CPUs; its note on where it is lies where no other program on this machine looks for one."""
    folder = tempfile.mkdtemp(prefix="ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
        yield cluster
        ray.shutdown()
        cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
