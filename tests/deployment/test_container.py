"""The container file: what it copies is there, and what it leaves out are secrets, state and history."""

import fnmatch
import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()


def words(instruction):
    return [line.split()[1:] for line in LINES if line.startswith(f"{instruction} ")]


def kept(path):
    """Whether a build sees a file, by the rules of .dockerignore: the last one that fits decides, for folders too."""
    keep = True
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if not rule or rule.startswith("#"):
            continue
        pattern, again = rule.removeprefix("!"), rule.startswith("!")
        parents = [str(Path(*Path(path).parts[:depth])) for depth in range(1, len(Path(path).parts) + 1)]
        if any(
            fnmatch.fnmatch(parent, pattern) or fnmatch.fnmatch(parent, pattern.removeprefix("**/")) for parent in parents
        ):
            keep = again
    return keep


def test_it_runs_as_nobody_special_and_as_the_manifests_say():
    (user,) = words("USER")
    for document in yaml.safe_load_all((ROOT / "kubernetes" / "chroma.yaml").read_text()):
        if document["kind"] == "StatefulSet":
            security = document["spec"]["template"]["spec"]["securityContext"]
            assert user == [f"{security['runAsUser']}:{security['runAsGroup']}"]
    assert LINES.index(next(line for line in LINES if line.startswith("USER"))) > max(
        number for number, line in enumerate(LINES) if line.startswith("RUN")
    )
    assert all(re.fullmatch(r"python:\$\{PYTHON\}-slim-\w+", image[0]) for image in words("FROM"))


def test_packages_are_installed_before_the_source_is_copied_and_by_the_tested_versions():
    commands = [line for line in LINES if re.match(r"(RUN|COPY)", line)]
    everything = commands.index("COPY . .")
    pinned = next(number for number, line in enumerate(commands) if "--requirement needed.txt" in line)
    assert pinned < everything and "--constraint constraints.txt" in commands[pinned]
    for file in ("pyproject.toml", "constraints.txt"):
        assert kept(file) and (ROOT / file).is_file()


def test_a_build_sees_the_package_and_neither_state_nor_history_nor_secrets():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    package = [
        path for path in tracked if path.startswith(("lorafleet/", "jobs/", "serve/", "configs/")) and (ROOT / path).exists()
    ]
    assert package and all(map(kept, package))
    for path in (
        "state/keys.json",
        ".git/config",
        ".venv/bin/python",
        "tests/conftest.py",
        ".env",
        "jobs/__pycache__/x.pyc",
    ):
        assert not kept(path), path
