"""The report: the figures of the records, in one file that asks no other host, readable in any light and on a phone."""

import json
import os
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from evaluation.conftest import METHODS

from lorafleet.errors import SettingsError
from lorafleet.evaluation import read_results
from lorafleet.evaluation.errors_by_rule import KINDS, error_rates, rows_of_kind
from lorafleet.evaluation.published import published, table_3
from lorafleet.evaluation.records import ABOUT, about
from lorafleet.evaluation.report import write_report
from lorafleet.evaluation.report.blocks import Section
from lorafleet.evaluation.report.comparison import beside_the_paper, ground, sweeps
from lorafleet.evaluation.report.markdown import as_markdown
from lorafleet.evaluation.results import Results, Row, TaskRows, judge


@pytest.fixture(scope="module")
def pages(measured: Path) -> tuple[str, str]:
    page, markdown = write_report(read_results(measured))
    return page.read_text(), markdown.read_text()


def test_both_pages_hold_the_figures(pages):
    page, markdown = pages
    for text in pages:
        for title in ("Method against task", "Retrieval", "Which task is taken for which", "Weights by task", "Sweeps"):
            assert title in text
        assert all(method in text for method in METHODS if "@" not in method)
        assert "Where can I buy a tennis ball?" in text
    # Perfect selection in the pool: 75, 100 and 100.
    assert '<span class="figure">91.7</span>' in page and "| perfect | 91.7 |" in markdown
    assert "100.0 % of perfect, +0.0 (+0.0 to +0.0)" in markdown
    (swept,) = {line for line in markdown.splitlines() if line.startswith("| cat |") and line.count("91.7 (") == 3}
    assert swept
    cells = next(line for line in markdown.splitlines() if line.startswith("| fruit (4 rows)"))
    assert cells.split("|")[2].strip().startswith("25.0 (") and "**75.0** (" in cells


def test_the_page_asks_no_other_host(pages):
    page, _ = pages
    assert not re.findall(r"(?:src|srcset)=|url\(|@import|<script|https?://", page)
    assert set(re.findall(r'href="([^"#]*)', page)) <= {"", "data:,"}


def test_predictions_of_two_fleets_are_not_passed_off_as_one(measured, tmp_path):
    assert read_results(measured).fleets == 1 and "Warning" not in as_markdown(*_page(measured))
    shutil.copytree(measured, tmp_path / "kept")
    path = tmp_path / "kept" / "predictions" / "iid" / "base" / "fruit.parquet"
    table = pq.read_table(path)
    said = {**about(path), "fleet": "another"}
    pq.write_table(table.replace_schema_metadata({ABOUT: json.dumps(said)}), path)
    assert "Warning: these predictions are of 2 different fleets" in as_markdown(*_page(tmp_path / "kept"))


def _page(folder: Path) -> tuple[Results, list[Section]]:
    results = read_results(folder)
    return results, [ground(results)]


def test_sections_without_records_are_left_out(measured, tmp_path):
    results = read_results(measured, methods=["base"], settings=("iid",))
    assert beside_the_paper(results) is None and sweeps(results) is None
    (tmp_path / "rows").symlink_to(measured / "rows")
    for setting in ("iid", "ood"):
        one = tmp_path / "predictions" / setting
        one.mkdir(parents=True)
        (one / "cat@p=0.5").symlink_to(measured / "predictions" / setting / "cat@p=0.5")
    page, _ = write_report(read_results(tmp_path))
    assert "Method against task" in page.read_text() and "Sweeps" not in page.read_text()
    with pytest.raises(SettingsError, match="no predictions"):
        read_results(measured, methods=["nothing"])


def test_retrieval_finds_the_own_task_with_its_instruction(pages):
    _, markdown = pages
    (row,) = [line for line in markdown.splitlines() if line.startswith("| with instruction |")]
    assert row.startswith("| with instruction | 100.0 (100.0 to 100.0) |")


def test_rules_see_what_they_say():
    inference = TaskRows("rte", "inference", "sum", {})
    everyday = TaskRows("piqa", "commonsense", "byte", {})
    kinds = {kind.name: kind.holds for kind in KINDS}
    assert len(KINDS) == 6
    denied = Row("Text: He didn't come.\nHypothesis: He came.", ("yes", "no"), ("no",))
    assert kinds["Negation"](inference, denied)
    assert not kinds["Negation"](inference, Row("Text: He noted it.\nHypothesis: A knot.", ("yes", "no"), ("no",)))
    assert not kinds["Entailment ambiguity"](inference, denied)
    reordered = Row("Text: The dog bit the man.\nHypothesis: The man bit the dog.", ("yes", "no"), ("no",))
    assert kinds["Entailment ambiguity"](inference, reordered)
    assert not kinds["Entailment ambiguity"](everyday, reordered)
    alike = Row("Goal: play", ("buy a tennis ball", "buy a tennis racket"), ("buy a tennis ball",))
    assert kinds["Ambiguity"](everyday, alike) and kinds["Commonsense"](everyday, alike)
    assert not kinds["Ambiguity"](everyday, Row("Goal: play", ("buy a ball", "sleep well"), ("buy a ball",)))
    assert kinds["Long context"](everyday, Row("word " * 120, ("a", "b"), ("a",)))
    assert not kinds["Long context"](everyday, Row("word " * 119, ("a", "b"), ("a",)))


def test_error_rates_count_rows(measured):
    results = read_results(measured)
    everything = {task.name: set(task.rows) for task in results.tasks.values()}
    rate, rows = error_rates(results, "iid", "base", everything)
    # 11 of 12 rows are wrong.
    assert rows == 12 and rate.value == pytest.approx(100 * 11 / 12)
    assert rows_of_kind(results, KINDS[0]) == {}


def test_another_scoring_changes_the_table_without_a_model():
    rows = {"r": Row("text", ("short", "a long one"), ("a long one",))}
    kept = [{"total": -2.0, "tokens": 1, "bytes": 5}, {"total": -3.0, "tokens": 3, "bytes": 10}]
    prediction = {"id": "r", "text": None, "options": kept, "weights": []}
    by = {scoring: judge(TaskRows("t", "f", scoring, rows), [prediction]).score[0] for scoring in ("sum", "token", "byte")}
    assert by == {"sum": 0, "token": 1, "byte": 1}


def test_published_figures_are_whole():
    table = table_3()
    assert len(table) == 14 and table["piqa"]["linear"] == 70.95 and "smear" not in table["cb"]
    columns = published()["table_3"]["columns"]
    assert all(len(row) == len(columns) for row in published()["table_3"]["tasks"].values())


@pytest.mark.integration
def test_a_phone_shows_it_without_scrolling_sideways_in_light_and_dark(measured, pages):
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no Chromium here: apt-get install chromium, or name one in CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        backgrounds = set()
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": 360, "height": 800}, color_scheme=scheme)
            page.goto((measured / "report.html").as_uri())
            assert page.evaluate("() => document.documentElement.scrollWidth") == 360
            backgrounds.add(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))
            assert page.locator("circle").count() > 10
        assert len(backgrounds) == 2
        browser.close()
