"""Every `__all__` names what exists: `from package import *` works, of lazy packages too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def exporting() -> list[str]:
    """The modules that set `__all__`, by hand or from a stub."""
    found = []
    for folder in ("lorafleet", "jobs", "serve", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            targets = [target for node in ast.walk(ast.parse(path.read_text())) for target in getattr(node, "targets", ())]
            if any(isinstance(name, ast.Name) and name.id == "__all__" for target in targets for name in ast.walk(target)):
                parts = path.relative_to(ROOT).with_suffix("").parts
                found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def test_there_are_some():
    assert {"lorafleet", "lorafleet.weighing", "lorafleet.retrieval", "lorafleet.engine"} <= set(exporting())


@pytest.mark.parametrize("module", exporting())
def test_all_that_a_module_exports_exists(module):
    probe = (
        f"import {module} as module; from {module} import *; "
        "assert module.__all__ and len(set(module.__all__)) == len(module.__all__); "
        "print([name for name in module.__all__ if name not in globals()])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", probe], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
