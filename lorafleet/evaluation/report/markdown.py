"""The page in Markdown: the same tables, plots as figures in words."""

from collections.abc import Sequence

from lorafleet.evaluation.report.blocks import Block, Cell, Curves, Note, Section, Spans, Table, interval
from lorafleet.evaluation.results import Results


def as_markdown(results: Results, sections: Sequence[Section]) -> str:
    """The whole page."""
    parts = ["# Evaluation"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += [text for block in section.blocks if (text := _block(block))]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    if isinstance(block, Note):
        return block.text
    if isinstance(block, Table):
        return _table(block.caption, block.headings, [[_cell(cell) for cell in row] for row in block.rows])
    if isinstance(block, Spans):
        rows = [[span.name, f"{span.figure.value:.1f}", interval(span.figure), span.remark] for span in block.spans]
        return _table(block.caption, ["method", "mean", "95 %", "against perfect selection"], rows)
    assert isinstance(block, Curves)
    # The table that follows a plot has its figures.
    return ""


def _table(caption: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(headings)} |", f"|{'|'.join('---' for _ in headings)}|"]
    lines += [f"| {' | '.join(text.replace('|', '&#124;') for text in row)} |" for row in rows]
    return f"**{caption}**\n\n" + "\n".join(lines)


def _cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.strong and cell.text else cell.text
    return f"{text} ({cell.small})" if cell.small else text
