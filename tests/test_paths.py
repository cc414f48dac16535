"""Every path in settings is absolute once they are loaded, whoever loads them."""

import os
import pwd
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lorafleet.cli.options import settings_from
from lorafleet.config import Settings, load_settings
from lorafleet.errors import SettingsError
from lorafleet.paths import MODEL, RAY_WORKING_DIRECTORIES
from serve.app import ROOT, build


def mentions(annotation: Any, kind: type) -> bool:
    return annotation is kind or any(mentions(part, kind) for part in get_args(annotation))


def fields(section: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """All fields of a tree of settings by their dotted names."""
    found = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= fields(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


PATHS = {
    name: get_origin(field.annotation) is list
    for name, field in fields(Settings).items()
    if mentions(field.annotation, Path)
}
MODELS = [name for name, field in fields(Settings).items() if MODEL in field.metadata]


def value_of(settings: Settings, dotted: str) -> Any:
    value: Any = settings
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def test_the_walk_finds_the_paths_that_there_are():
    assert {"state", "guard.keys_file", "serving.adapter_roots", "evaluation.folder", "tasks.hub_root"} <= set(PATHS)
    assert {name for name, field in fields(Settings).items() if name.endswith((".base", ".encoder", ".start"))} == set(
        MODELS
    )


@pytest.mark.parametrize("load", [load_settings, settings_from])
def test_every_path_and_local_model_is_absolute(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/of/mine")
    given = [f"{name}={'[here, ~/there]' if many else 'here'}" for name, many in PATHS.items()]
    settings = load(overrides=[*given, *(f"{name}=./here" for name in MODELS)])
    for name, many in PATHS.items():
        here, there = tmp_path / "here", Path("/home/of/mine/there")
        assert value_of(settings, name) == ([here, there] if many else here), name
    assert [value_of(settings, name) for name in MODELS] == [str(tmp_path / "here")] * len(MODELS)


def test_the_application_of_a_serve_config_starts_from_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORAFLEET_STATE", raising=False)
    given = [f"{name}={'[here]' if many else 'here'}" for name, many in PATHS.items() if name != "state"]
    gateway = build({"state": "here", "set": [*given, "models.encoder=./here"]})._bound_deployment
    settings = gateway.init_args[0]
    for name, many in PATHS.items():
        assert value_of(settings, name) == ([ROOT / "here"] if many else ROOT / "here"), name
    assert settings.models.encoder == str(ROOT / "here")


def test_a_file_that_is_a_link_keeps_its_name_and_a_folder_is_followed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mounted").mkdir()
    (tmp_path / "mounted" / "keys.json").symlink_to("2026-11-28/keys.json")
    (tmp_path / "state").symlink_to("mounted")
    settings = load_settings(overrides=["guard.keys_file=state/keys.json"])
    assert settings.keys_file == tmp_path / "mounted" / "keys.json", "the next secret has another target"
    assert settings.state == tmp_path / "mounted"
    assert load_settings(overrides=["state=mounted/.."]).state == tmp_path


@pytest.mark.parametrize("name", sorted(set(PATHS) - {"tasks.hub_root", "tasks.declarations"}))
def test_a_job_refuses_what_ray_would_delete_with_its_working_directory(name, tmp_path, monkeypatch):
    folder = tmp_path / RAY_WORKING_DIRECTORIES / "x"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    safe = [] if name == "state" else [f"state={tmp_path}"]
    given = f"{name}={'[here]' if PATHS[name] else 'here'}"
    with pytest.raises(SettingsError, match=rf"^{name} = here is relative.*Ray deletes\. Give an absolute"):
        load_settings(overrides=[*safe, given])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("~nobody-of-this-name/state", r"Could not determine home"),
        ("a\0b", "without null bytes"),
        ("a\udcffb", "in UTF-8"),
        ("circle/state", "can be followed"),
    ],
)
def test_a_path_that_cannot_be_is_one_error_with_its_name(value, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    for name in ("state", "models"):
        sections = {"state": Path(value)} if name == "state" else {"state": tmp_path, "models": {"base": f"./{value}"}}
        if name == "models" and value.startswith("~"):
            sections["models"] = {"base": value}
        with pytest.raises(SettingsError, match=rf"^bad value for {name}.*{said}") as caught:
            load_settings(**sections)
        assert str(caught.value).isprintable()


def test_without_a_home_folder_only_paths_that_need_one_are_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    with pytest.raises(KeyError):
        pwd.getpwuid(os.getuid())
    assert load_settings(state=tmp_path).state == tmp_path
    with pytest.raises(SettingsError, match=r"bad value for state: '~/x'"):
        load_settings(state=Path("~/x"))


def test_a_command_in_a_deleted_folder_says_so(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(SettingsError, match="the working directory does not exist any more"):
        load_settings()
