"""Settings for small trainings of the tiny model."""

import pytest
from tiny_language_model import write_tiny_model

from lorafleet.config import load_settings


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_settings(base, tmp_path):
    def make(tasks, steps=3, **training):
        recipe = {"rank": 4, "max_steps": steps, "learning_rate": 0.02, "warmup_steps": 1, "max_tokens": 96}
        return load_settings(
            state=tmp_path / "state",
            models={"base": str(base), "device": "cpu"},
            tasks=tasks,
            # One worker group is enough for most, and soon started.
            training={**recipe, "accumulation": 1, "workers": 1, **training},
        )

    return make
