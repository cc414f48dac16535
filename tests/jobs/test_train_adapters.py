"""The job on a real Ray: skips what is current, survives a broken task, trains one adapter by two workers, plans."""

import shutil
import sys

import pytest
import ray
from safetensors.torch import load_file
from tiny_training_job import place, undisturbed, weights, written

from jobs.train_adapters import main, train_adapters
from lorafleet.adapters import stored_adapters
from lorafleet.errors import TrainingError
from lorafleet.tasks import load_catalogue, load_corpus
from lorafleet.tasks.corpus import SAMPLES
from lorafleet.training import read_card
from lorafleet.training.checkpoints import checkpoint_folder

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


def declare(tmp_path, name, rows):
    """A task of one's own, of rows of wnli."""
    (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    declaration = tmp_path / f"{name}.yaml"
    declaration.write_text(
        f"{name}:\n  family: test\n  files: {{train: {name}.jsonl}}\n  instruction: Say what follows.\n"
        '  text: "{sentence1} {sentence2}"\n  options: ["no", "yes"]\n  label: label\n',
        encoding="utf-8",
    )
    return declaration


def wnli_rows():
    return (SAMPLES / "wnli" / "train.jsonl").read_text(encoding="utf-8").splitlines()


def test_trains_two_skips_both_and_trains_again_what_changed_or_is_forced(make_settings, tmp_path):
    declaration = declare(tmp_path, "own", wnli_rows()[:8])
    settings = make_settings({"names": ["copa", "own"], "declarations": [declaration]})
    first = train_adapters(settings)
    assert first.failed == {}
    assert set(first.adapters) == {"copa", "own"}
    assert all(card.last_loss < card.first_loss for card in first.adapters.values())
    leftover = checkpoint_folder(place(settings, "copa"))
    leftover.mkdir()
    assert set(train_adapters(settings).skipped) == {"copa", "own"}
    assert not leftover.exists()
    declare(tmp_path, "own", wnli_rows()[1:9])
    third = train_adapters(settings)
    assert third.skipped == ("copa",)
    assert third.adapters["own"].corpus != first.adapters["own"].corpus

    before = weights(place(settings, "copa"))
    forced = train_adapters(make_settings({"names": ["copa"]}), force=True)
    assert forced.skipped == ()
    assert weights(place(settings, "copa")) == before


def test_failures_stay_alone_and_the_exit_code_and_the_last_lines_tell(make_settings, tmp_path, monkeypatch, capsys):
    declaration = declare(tmp_path, "broken", ['{"sentence1": "x", "sentence2": "y", "label": 9}'])
    settings = make_settings({"names": ["broken", "copa", "wnli"], "declarations": [declaration]})
    settings.adapters.mkdir(parents=True)
    place(settings, "wnli").symlink_to("nowhere")  # No folder can be renamed to this place.
    monkeypatch.setattr(sys, "argv", ["train_adapters", "--config", str(written(settings, tmp_path / "settings.yaml"))])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    output = capsys.readouterr()
    assert "1 trained, 0 skipped, 2 failed" in output.out
    assert "failed: broken: task broken has no usable row" in output.err
    assert "failed: wnli: NotADirectoryError" in output.err
    assert "copa done, step 3 of 3" in output.err
    assert read_card(place(settings, "copa")) is not None


def test_one_adapter_is_trained_on_the_rows_of_all_tasks_together(make_settings, tmp_path):
    settings = make_settings({"names": ["copa", "wnli"]}, together="everything")
    report = train_adapters(settings)
    (card,) = report.adapters.values()
    rows = [len(load_corpus(task, "train", settings.tasks).examples) for task in load_catalogue(settings.tasks).values()]
    assert (card.name, card.task, card.rows) == (place(settings, "everything").name, "everything", sum(rows))
    assert "everything" in stored_adapters(settings)
    assert train_adapters(settings).skipped == ("everything",)
    with pytest.raises(TrainingError, match=r"training\.together = piqa is the name of a task"):
        train_adapters(make_settings({"names": ["copa", "wnli"]}, together="piqa"))
    declaration = declare(tmp_path, "broken", ['{"sentence1": "x", "sentence2": "y", "label": 9}'])
    with pytest.raises(TrainingError, match="broken cannot be read"):
        train_adapters(make_settings({"names": ["copa", "broken"], "declarations": [declaration]}, together="everything"))


def test_two_workers_train_the_adapter_of_one(make_settings, tmp_path):
    settings = make_settings({"names": ["copa"]}, workers=2, workers_per_adapter=2)
    assert train_adapters(settings).failed == {}
    undisturbed(settings, "copa", tmp_path / "alone")
    together = load_file(place(settings, "copa") / "adapter_model.safetensors")
    for name, weight in load_file(tmp_path / "alone" / "adapter_model.safetensors").items():
        assert together[name].allclose(weight, atol=1e-5), name


def test_a_model_that_no_worker_can_load_ends_the_job_with_its_reason(make_settings, base, tmp_path):
    settings = make_settings({"names": ["copa", "wnli"]})
    shutil.copytree(base, tmp_path / "hollow", ignore=shutil.ignore_patterns("*.safetensors"))
    models = settings.models.model_copy(update={"base": str(tmp_path / "hollow")})
    report = train_adapters(settings.model_copy(update={"models": models}))
    assert set(report.failed) == {"copa", "wnli"}
    for reason in report.failed.values():
        assert reason.startswith("no worker can begin: cannot load the base model")


def test_a_dry_run_prints_the_plan_and_trains_nothing(make_settings, tmp_path, monkeypatch, capsys):
    settings = make_settings({"names": ["copa", "wnli"]}, steps=5, max_tokens=32, workers=2)
    config = str(written(settings, tmp_path / "settings.yaml"))
    monkeypatch.setattr(sys, "argv", ["train_adapters", "--config", config, "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    output = capsys.readouterr()
    assert "To train: 2 adapters on" in output.out
    assert "in 10 steps" in output.out
    assert "Workers: 2, 1 an adapter" in output.out
    assert "steps of" in output.out and "on the clock" in output.out
    assert "are longer than training.max_tokens = 32" in output.err
    assert not settings.state.exists()


def test_what_the_cluster_cannot_hold_is_refused_all_at_once(make_settings):
    settings = make_settings({"names": ["copa"]}, cpus_per_worker=64, rank=10**9)
    with pytest.raises(TrainingError, match=r"find no room in a cluster of 2 CPU.*adapters and checkpoints take up to"):
        train_adapters(settings)
    assert not settings.state.exists()
