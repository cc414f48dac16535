"""The walls between the rooms, held by reading every module's imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = {"lorafleet", "jobs", "serve"}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def modules(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"nothing in {folder}"
    return found


def offenders(folder: str, forbidden: set[str], but: str = "") -> list[str]:
    return [
        f"{path.relative_to(ROOT)}: {name}"
        for path in modules(folder)
        if not (but and path.is_relative_to(ROOT / but))
        for name in sorted(imports_of(path))
        if any(name == wall or name.startswith(f"{wall}.") for wall in forbidden)
    ]


@pytest.mark.parametrize(
    ("folder", "forbidden", "but"),
    [
        ("lorafleet", {"ray", "jobs", "serve"}, ""),
        ("lorafleet", {"chromadb"}, "lorafleet/retrieval"),
        ("lorafleet", {"unsloth"}, "lorafleet/training"),
        ("jobs", {"chromadb", "unsloth"}, ""),
        ("serve", {"chromadb", "unsloth"}, ""),
        ("lorafleet/composition", {"lorafleet.retrieval", "lorafleet.weighing", "lorafleet.tasks", "lorafleet.engine"}, ""),
        ("lorafleet/engine", {"lorafleet.tasks", "lorafleet.retrieval", "lorafleet.weighing"}, ""),
        ("lorafleet/weighing", {"lorafleet.retrieval", "lorafleet.composition", "lorafleet.tasks"}, ""),
        ("lorafleet/retrieval", {"lorafleet.tasks", "lorafleet.composition", "lorafleet.weighing"}, ""),
    ],
)
def test_no_module_walks_through_a_wall(folder, forbidden, but):
    assert offenders(folder, forbidden, but) == []


def test_tasks_know_nothing_of_the_house_but_settings_and_errors():
    allowed = ("lorafleet.tasks", "lorafleet.config", "lorafleet.errors")
    for path in modules("lorafleet/tasks"):
        for name in imports_of(path):
            if name.split(".")[0] in HOUSE:
                assert name.startswith(allowed), f"{path.name} imports {name}"


@pytest.mark.parametrize(
    ("module", "packages"),
    [
        ("lorafleet.cli", ("torch", "transformers", "chromadb", "ray")),
        # Whoever deploys the application, and every replica but those that hold a model.
        ("serve.app", ("torch", "transformers", "peft", "sentence_transformers")),
        ("jobs.embed_corpora", ("torch", "transformers", "peft")),
    ],
)
def test_nobody_waits_for_packages_that_he_does_not_need(module, packages):
    probe = f"import sys, {module}; print([package for package in {packages} if package in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
