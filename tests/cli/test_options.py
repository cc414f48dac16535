"""What a command line's settings mean to Ray's workers, whose working directory is another."""

import pytest

from lorafleet.cli.options import settings_from
from lorafleet.config import Models
from lorafleet.errors import SettingsError
from lorafleet.paths import RAY_WORKING_DIRECTORIES


def test_what_lies_here_is_named_by_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "encoder").mkdir()
    (tmp_path / "blob").touch()
    (tmp_path / "base.gguf").symlink_to("blob")
    settings = settings_from(
        overrides=[
            "models={base: base.gguf, encoder: encoder}",
            "tuning.start=./encoder",
            "tasks={hub_root: hub, declarations: [own.yaml]}",
            "evaluation.folder=results",
        ]
    )
    assert settings.state == tmp_path / "state"
    assert settings.models == Models(base=str(tmp_path / "base.gguf"), encoder=str(tmp_path / "encoder"))
    assert settings.tuning.start == str(tmp_path / "encoder")
    assert (settings.tasks.hub_root, settings.tasks.declarations) == (tmp_path / "hub", [tmp_path / "own.yaml"])
    assert settings.evaluation.folder == tmp_path / "results"


def test_models_of_the_hub_and_of_packages_keep_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = settings_from(overrides=["models.base=meta-llama/Llama-2-7b-hf"])
    assert settings.models == Models(base="meta-llama/Llama-2-7b-hf")
    assert (settings.tuning.start, settings.tasks.hub_root, settings.evaluation.folder) == (None, None, None)


def test_a_job_refuses_an_evaluation_folder_that_ray_would_delete(tmp_path, monkeypatch):
    folder = tmp_path / RAY_WORKING_DIRECTORIES / "x"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    with pytest.raises(SettingsError, match=r"evaluation\.folder = results is relative.*Give an absolute folder"):
        settings_from(state=tmp_path, overrides=["evaluation.folder=results"])
    assert settings_from(state=tmp_path, overrides=[f"evaluation.folder={tmp_path}"]).evaluation.folder == tmp_path
