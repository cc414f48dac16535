"""The page in HTML: one file, no script, no other host; light and dark, and readable on a phone."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from lorafleet.evaluation.report.blocks import Block, Cell, Curves, Note, Section, Spans, Table
from lorafleet.evaluation.report.figures import curves_svg, legend, spans_rows
from lorafleet.evaluation.results import Results

WORDS = ' class="words"'
STYLE = Path(__file__).with_name("report.css")


def as_page(results: Results, sections: Sequence[Section]) -> str:
    """The whole page."""
    contents = "".join(f'<li><a href="#{section.anchor}">{escape(section.title)}</a></li>' for section in sections)
    body = "\n".join(_section(section) for section in sections)
    rows = sum(len(task.rows) for task in results.tasks.values())
    methods = {method for setting in results.settings for method in results.methods(setting)}
    answers = sum(len(j.ids) for by in results.judged.values() for tasks in by.values() for j in tasks.values())
    said = f"{len(methods)} methods, {len(results.tasks)} tasks, {rows:,} rows, {answers:,} answers"
    date = str(results.made_by.get("date", ""))[:10]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>LoRAFleet: evaluation</title>
<link rel="icon" href="data:,">
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<header class="masthead"><p class="wordmark">LoRAFleet</p><p class="hint">{escape(date)}</p></header>
<main>
<h1>Every method on the same rows</h1>
<p class="lead">{said}</p>
<nav aria-label="Contents"><ol>{contents}</ol></nav>
{body}
</main>
</body>
</html>
"""


def _section(section: Section) -> str:
    blocks = "\n".join(_block(block) for block in section.blocks)
    return f'<section id="{section.anchor}">\n<h2>{escape(section.title)}</h2>\n{blocks}\n</section>'


def _block(block: Block) -> str:
    if isinstance(block, Note):
        return f'<p class="note">{escape(block.text)}</p>'
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Spans):
        marks = ", ".join(f"{name} {value:.1f}" for name, value in block.marks.items())
        lines = f'<p class="hint">Thin lines: {escape(marks)}</p>' if marks else ""
        return f"<figure><figcaption>{escape(block.caption)}</figcaption>{spans_rows(block)}{lines}</figure>"
    assert isinstance(block, Curves)
    return f"<figure><figcaption>{escape(block.caption)}</figcaption>{curves_svg(block)}{legend(block)}</figure>"


def _table(table: Table) -> str:
    headings = "".join(
        f'<th scope="col"{WORDS if _is_words(below) else ""}><span>{escape(heading)}</span></th>'
        for heading, below in zip(table.headings, table.rows[0], strict=True)
    )
    rows = "\n".join(
        f'<tr><th scope="row">{_inside(row[0])}</th>{"".join(_cell(cell) for cell in row[1:])}</tr>' for row in table.rows
    )
    kind = "narrow" if table.narrow else "wide"
    # A region that scrolls has to be reached by the keyboard.
    return (
        f'<p class="caption">{escape(table.caption)}</p>\n'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.caption)}"><table class="{kind}">'
        f"\n<thead><tr>{headings}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    kinds = [
        name for name, is_so in (("less", cell.shade < 0), ("more", cell.shade > 0), ("words", _is_words(cell))) if is_so
    ]
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    shade = f' style="--shade:{abs(cell.shade):.2f}"' if cell.shade else ""
    return f"<td{kind}{shade}>{_inside(cell)}</td>"


def _inside(cell: Cell) -> str:
    text = f"<b>{escape(cell.text)}</b>" if cell.strong else escape(cell.text)
    return f"{text}<small>{escape(cell.small)}</small>" if cell.small else text


def _is_words(cell: Cell) -> bool:
    return any(character.isalpha() for character in cell.text)
