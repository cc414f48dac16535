"""Plots as SVG that takes its colours from the page, and its words in the page's own type wherever they stand beside it."""

from html import escape

from lorafleet.evaluation.report.blocks import Curves, Spans

WIDTH, HEIGHT = 340, 220
LEFT, RIGHT, TOP, BOTTOM = 38, 18, 10, 34
DASHES = ("none", "5 3", "2 3", "8 3 2 3")
STEPS = (1, 2, 5, 10, 20, 25, 50)


def spans_rows(spans: Spans) -> str:
    """A row of HTML for each line: its name, its interval on a scale that all share, and the figure."""
    values = [value for span in spans.spans for value in (span.figure.low, span.figure.high)] + list(spans.marks.values())
    low, high = min(values), max(values)
    room = max((high - low) * 0.04, 0.5)
    low, high = low - room, high + room

    def place(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    marks = "".join(
        f'<line class="mark" x1="{place(value)}" x2="{place(value)}" y1="0" y2="100%"><title>{escape(name)}: {value:.1f}'
        "</title></line>"
        for name, value in spans.marks.items()
    )
    rows = []
    for span in spans.spans:
        found = span.figure
        drawn = (
            f'<line class="reach" x1="{place(found.low)}" x2="{place(found.high)}" y1="50%" y2="50%"/>'
            f'<circle cx="{place(found.value)}" cy="50%" r="4.5"/>'
        )
        said = f"{span.name}: {found.value:.1f}, from {found.low:.1f} to {found.high:.1f}"
        rows.append(
            f'<li><span class="name">{escape(span.name)}</span>'
            f'<svg role="img" aria-label="{escape(said)}">{marks}{drawn}</svg>'
            f'<span class="figure">{found.value:.1f}</span><span class="remark">{escape(span.remark)}</span></li>'
        )
    return f'<ol class="spans">{"".join(rows)}</ol>'


def curves_svg(curves: Curves) -> str:
    """Curves with their intervals as bands, small enough to be read on a phone."""
    points = [point for curve in curves.curves for point in curve.points]
    across = sorted({value for value, _ in points})
    low = min(found.low for _, found in points)
    high = max(found.high for _, found in points)
    step = next((size for size in STEPS if (high - low) / size <= 5), STEPS[-1])
    low, high = step * (low // step), step * -(-high // step)
    high = high if high > low else low + step
    width = across[-1] - across[0] or 1.0

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((value - across[0]) / width if len(across) > 1 else 0.5)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    drawn = []
    for number in range(round((high - low) / step) + 1):
        value = low + number * step
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in across:
        drawn.append(f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    drawn.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">{escape(curves.across)}</text>'
    )
    for number, curve in enumerate(curves.curves):
        upper = [f"{x(value):.1f},{y(found.high):.1f}" for value, found in curve.points]
        lower = [f"{x(value):.1f},{y(found.low):.1f}" for value, found in reversed(curve.points)]
        line = " ".join(f"{x(value):.1f},{y(found.value):.1f}" for value, found in curve.points)
        dash = DASHES[number % len(DASHES)]
        colour = f"series-{number % 6}"
        drawn.append(f'<polygon class="band {colour}" points="{" ".join(upper + lower)}"/>')
        drawn.append(f'<polyline class="curve {colour}" stroke-dasharray="{dash}" points="{line}"/>')
        for value, found in curve.points:
            said = f"{curve.name}, {curves.across} {value:g}: {found.value:.1f}, from {found.low:.1f} to {found.high:.1f}"
            dot = f'cx="{x(value):.1f}" cy="{y(found.value):.1f}" r="3"'
            drawn.append(f'<circle class="dot {colour}" {dot}><title>{escape(said)}</title></circle>')
    label = escape(f"{curves.caption}; the figures stand in the table")
    return f'<svg class="curves" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(drawn)}</svg>'


def legend(curves: Curves) -> str:
    """What each curve is."""
    entries = "".join(
        f'<li><svg viewBox="0 0 28 10"><line class="curve series-{number % 6}" stroke-dasharray="'
        f'{DASHES[number % len(DASHES)]}" x1="0" x2="28" y1="5" y2="5"/></svg>{escape(curve.name)}</li>'
        for number, curve in enumerate(curves.curves)
    )
    return f'<ul class="legend">{entries}</ul>'
