"""One page of everything that was measured, for people: a self-contained HTML file and the same in Markdown.

Reads from top to bottom: `blocks` (what a page is made of), `figures` (plots as SVG), `comparison`, `retrieval` and `errors`
(what the page says, from the results), `page` and `markdown` (how it looks).
"""

from pathlib import Path

from lorafleet.evaluation.report.comparison import (
    against_tasks,
    beside_the_paper,
    families,
    ground,
    means,
    sweeps,
)
from lorafleet.evaluation.report.errors import case_study, error_analysis
from lorafleet.evaluation.report.markdown import as_markdown
from lorafleet.evaluation.report.page import as_page
from lorafleet.evaluation.report.retrieval import confusion, retrieval_accuracy, weights_by_task
from lorafleet.evaluation.results import Results
from lorafleet.storage import file_in_one_step

BUILDERS = (
    means,
    against_tasks,
    families,
    beside_the_paper,
    retrieval_accuracy,
    confusion,
    weights_by_task,
    sweeps,
    error_analysis,
    case_study,
    ground,
)


def write_report(results: Results) -> list[Path]:
    """Write report.html and report.md beside the predictions; sections without anything to say are left out."""
    sections = [section for build in BUILDERS if (section := build(results)) is not None]
    written = []
    for name, text in (("report.html", as_page(results, sections)), ("report.md", as_markdown(results, sections))):
        path = results.folder / name
        with file_in_one_step(path) as file:
            file.write(text.encode())
        written.append(path)
    return written
