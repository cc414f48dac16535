"""The job on a real Ray: a run that is killed leaves nothing, the next one an encoder that is whole, and that is kept."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from jobs.train_retriever import main, measured, train_retriever
from lorafleet.config import Settings, load_settings
from lorafleet.errors import SettingsError
from lorafleet.models import load_encoder
from lorafleet.retrieval import Encoder

pytestmark = pytest.mark.integration
ENDLESS = 100_000


def small_settings(state: Path, **tuning) -> Settings:
    """Settings for a whitening on a few rows of two tasks, whose state folder holds an encoder that is not whole."""
    left = state / ".encoder.1"
    left.mkdir(parents=True)
    (left / "modules.json").write_text("[]")
    recipe = {"recipe": "whiten", "rows_per_task": 8, "shrinkage": 0.5, **tuning}
    return load_settings(state=state, tasks={"names": ["copa", "wnli"]}, tuning=recipe, models={"device": "cpu"})


def test_a_killed_run_leaves_nothing_and_the_next_ones_tune_once(cluster, tmp_path):
    settings = small_settings(tmp_path / "state")
    command = [sys.executable, "-m", "jobs.train_retriever", "--state", str(settings.state), "--tasks", "copa,wnli"]
    overrides = ["tuning.recipe=contrast", "tuning.max_tokens=16", f"tuning.steps={ENDLESS}", "models.device=cpu"]
    command += [part for override in overrides for part in ("--set", override)]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as job:
        assert any(f" of {ENDLESS}" in line for line in job.stderr)
        job.send_signal(signal.SIGKILL)
    assert not (settings.state / "encoder").exists()

    first = train_retriever(settings)
    assert first.tuned
    assert first.tasks == ("copa", "wnli")
    assert [path.name for path in settings.state.iterdir() if path.name != ".tune.lock"] == ["encoder"]
    tuned = settings.models.model_copy(update={"encoder": str(first.folder)})
    assert Encoder(tuned).fingerprint != Encoder(settings.models).fingerprint
    assert len(load_encoder(tuned)) == len(load_encoder(settings.models)) + 2

    tuning = settings.tuning.model_copy(update={"start": settings.models.encoder})
    serving = settings.model_copy(update={"models": tuned, "tuning": tuning})
    assert not train_retriever(serving).tuned, "the settings of those who search with it will do"

    written = (first.folder / "tuning.json").stat().st_mtime_ns
    assert not train_retriever(settings).tuned
    assert (first.folder / "tuning.json").stat().st_mtime_ns == written

    few = settings.model_copy(update={"tasks": settings.tasks.model_copy(update={"rows_per_task": 4})})
    found = {(one.encoder, one.tasks, one.form): one for one in measured(few, first, limit=2)}
    assert {side for side, _, _ in found} == {"frozen", "tuned"}
    assert {(group, one.count, one.queries) for (_, group, _), one in found.items()} == {
        ("seen", 2, 4),
        ("unseen", 20, 40),
        ("all", 22, 44),
    }
    assert {form for *_, form in found} == {"instruction", "fields", "bare"}
    for one in found.values():
        shares = [one.first[rank].value for rank in (1, 3, 5, 8)]
        assert shares == sorted(shares)
        assert one.family.value >= one.first[1].value
    assert found["frozen", "all", "instruction"].first[8].value > 80
    assert found["frozen", "all", "bare"].first[1].value < found["frozen", "all", "instruction"].first[1].value

    other = settings.model_copy(update={"tuning": settings.tuning.model_copy(update={"shrinkage": 0.9})})
    assert train_retriever(other).tuned
    assert ray.is_initialized()


def test_the_tuned_encoder_is_not_tuned_once_more(tmp_path):
    settings = small_settings(tmp_path / "state")
    (settings.state / "encoder").mkdir()
    models = settings.models.model_copy(update={"encoder": str(settings.state / "encoder")})
    itself = settings.model_copy(update={"models": models})
    with pytest.raises(SettingsError, match="is the tuned encoder itself"):
        train_retriever(itself)


def test_the_command_says_what_stands_in_the_way(monkeypatch, capsys, tmp_path, cluster):
    for options, said in (
        (("--tasks", "copa"), "cannot be tuned on 1 tasks (copa)"),
        (("--limit", "5"), "--limit 5 bounds what --measure asks, which is not given"),
    ):
        monkeypatch.setattr(sys, "argv", ["train_retriever", "--state", str(tmp_path), *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
        assert said in capsys.readouterr().err
