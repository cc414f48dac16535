"""The operators' pages: the messages that they explain are the code's, their sums are right, their links lead somewhere."""

import ast
import re
from pathlib import Path

import pytest

from lorafleet.config import Scaling

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = ["operations.md", "deployment.md", "security.md", "troubleshooting.md"]
VARIES = "…"


def said_by_the_code():
    """Every string of the sources, with … for what is filled in."""
    for room in ("lorafleet", "serve", "jobs"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else VARIES for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_the_messages_of_the_troubleshooting_tables_are_those_of_the_code():
    text = (DOCS / "troubleshooting.md").read_text()
    told = re.findall(r"^\| (?:\d{3} )?`([^`]+)` \|", text, re.MULTILINE)
    assert len(told) > 25
    # What is filled in may hold several parts, and quotes around it.
    known = [re.sub(f"[{VARIES}'! ]+", " ", message) for message in said_by_the_code()]
    missing = [
        message for message in told if not any(re.sub(f"[{VARIES}'! ]+", " ", message).strip() in one for one in known)
    ]
    assert missing == []


def test_the_sizes_by_arithmetic_add_up():
    """bytes = rank x (inputs + outputs of every linear layer) x bytes a number."""

    def numbers(hidden, inner, cached, layers):
        attention = (hidden + hidden) + 2 * (hidden + cached) + (hidden + hidden)
        return layers * (attention + 3 * (hidden + inner))

    text = (DOCS / "operations.md").read_text()
    models = {
        "SmolLM2-135M, float32": (numbers(576, 1536, 192, 30), 4),
        "Llama 2 7B, bfloat16": (numbers(4096, 11008, 4096, 32), 2),
    }
    assert all(f"{number:,} x r" in text for number, _ in models.values())
    model, checked = "", 0
    for cells in re.findall(
        r"^\|([^|]*)\| (\d+) \| ([\d.]+) MB \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) GB \|$", text, re.MULTILINE
    ):
        model = cells[0].strip() or model
        number, width = models[model]
        one = int(cells[1]) * number * width
        wanted = [one / 1e6, 22 * one / 1e9, 100 * one / 1e9, 1000 * one / 1e9]
        assert [float(cell) for cell in cells[2:]] == pytest.approx(wanted, rel=0.03)
        checked += 1
    assert checked == 6
    row = 384 * 4 + (64 * 4 + 4) + (32 * 4 + 4) / 31 + 8
    for rows, graph in re.findall(r"^\| ([\d,]+) \| ([\d.]+ [MG]B) \|", text, re.MULTILINE):
        scale = 1e6 if graph.endswith("MB") else 1e9
        assert float(graph.split()[0]) == pytest.approx(int(rows.replace(",", "")) * row / scale, rel=0.02)


def test_the_table_of_limits_names_every_setting_of_a_deployment():
    text = (DOCS / "operations.md").read_text()
    assert [name for name in Scaling.model_fields if f"`{name}`" not in text] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    text = (DOCS / page).read_text()
    for target, heading in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", text):
        path = (DOCS / target).resolve() if target else DOCS / page
        assert path.exists(), target
        if heading:
            anchors = {
                re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
                for line in path.read_text().splitlines()
                if line.startswith("#")
            }
            assert heading in anchors, f"{target}#{heading}"
