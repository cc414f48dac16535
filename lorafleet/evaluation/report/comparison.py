"""What the page says of the methods: their means, every task, the families, the paper's table, sweeps, and the ground."""

from collections.abc import Sequence

from lorafleet.evaluation.intervals import Estimate
from lorafleet.evaluation.published import published, table_3
from lorafleet.evaluation.report.blocks import (
    Block,
    Cell,
    Curve,
    Curves,
    Note,
    Section,
    Span,
    Spans,
    Table,
    figure,
    interval,
)
from lorafleet.evaluation.results import REFERENCE, Measure, Results
from lorafleet.evaluation.tables import TITLES
from lorafleet.evaluation.under_test import Setting

SHADE_POINTS = 40.0
MINUS = "\N{MINUS SIGN}"
MARKED = ("base", REFERENCE)
SWEPT = {"p": "nucleus mass p", "k": "adapters k", "density": "density", "temperature": "temperature"}


def plain(methods: Sequence[str]) -> list[str]:
    """The methods without their variants."""
    return [method for method in methods if "@" not in method]


def means(results: Results) -> Section:
    """Every method's mean in each setting, with what it is of perfect selection."""
    blocks: list[Block] = [
        Note(
            "Every method answers the same rows. A figure is the share of right answers in per cent, averaged over tasks "
            "that all count the same; its interval holds 95 % of the means of rows drawn anew within each task. Shares of "
            "perfect selection are over the rows that both answered; with the own adapter masked it is what there was to "
            "reach."
        )
    ]
    for setting in results.settings:
        methods = [method for method in results.methods(setting) if not _is_swept(method)]
        found = {method: mean for method in methods if (mean := results.mean(setting, method)) is not None}
        if not found:
            continue
        tasks = len(results.tasks_of(setting))
        # A mean over some of the tasks says nothing beside one over all.
        parts = {method: len(results.scores(setting, method)) for method in found}
        ordered = sorted(found, key=lambda method: (-parts[method], -found[method].value))
        marks = {method: found[method].value for method in MARKED if method in found}
        caption = f"{TITLES[setting]}: mean over {tasks} task{'s' if tasks != 1 else ''}"
        notes = {m: f"over {parts[m]} of them alone; " if parts[m] < tasks else "" for m in ordered}
        blocks.append(
            Spans(caption, [Span(m, found[m], notes[m] + _of_perfect(results, setting, m)) for m in ordered], marks)
        )
    return Section("The methods", blocks)


def _is_swept(method: str) -> bool:
    """Whether a variant has its place in the plots of sweeps."""
    _, *changes = method.split("@")
    return len(changes) == 1 and changes[0].partition("=")[0] in SWEPT


def _of_perfect(results: Results, setting: Setting, method: str) -> str:
    against = None if method == REFERENCE else results.against(setting, method)
    if against is None:
        return ""
    difference, share = against
    points = f"{difference.value:+.1f} ({difference.low:+.1f} to {difference.high:+.1f})".replace("-", MINUS)
    return f"{share.value:.1f} % of perfect, {points}" if share else points


def against_tasks(results: Results) -> Section:
    """Method against task, with intervals."""
    blocks: list[Block] = [
        Note(
            "Below each figure its interval. Colour tells the difference to the untouched base model; the best of a row, "
            "perfect selection aside, is set in bold. Free-text questions count exact matches, and the F1 of words stands "
            "in a row of its own below."
        )
    ]
    for setting in results.settings:
        methods = plain(results.methods(setting))
        if not methods:
            continue
        rows = [row for task in results.tasks_of(setting) for row in _task_rows(results, setting, task, methods)]
        rows.append([Cell("mean"), *(figure(results.mean(setting, method)) for method in methods)])
        blocks.append(Table(TITLES[setting], ["task", *methods], rows))
    return Section("Method against task", blocks)


def _task_rows(results: Results, setting: Setting, task: str, methods: Sequence[str]) -> list[list[Cell]]:
    """A task's row, and for free-text questions another one with the F1 of words."""
    judged = [results.judged[setting].get(method, {}).get(task) for method in methods]
    rows = [_figures(results, setting, task, methods, "score")]
    if any(one is not None and one.f1 is not None for one in judged):
        rows.append(_figures(results, setting, task, methods, "f1"))
    return rows


def _figures(results: Results, setting: Setting, task: str, methods: Sequence[str], measure: Measure) -> list[Cell]:
    found = {method: results.task(setting, method, task, measure) for method in methods}
    base = found.get("base")
    values = [one.value for method, one in found.items() if one is not None and method != REFERENCE]
    best = max(values, default=0.0)
    cells = [Cell(task, f"{len(results.tasks[task].rows)} rows") if measure == "score" else Cell("", "F1 of words")]
    for method, one in found.items():
        shade = (one.value - base.value) / SHADE_POINTS if one and base else 0.0
        strong = one is not None and method != REFERENCE and one.value == best > min(values)
        cells.append(figure(one, max(-1.0, min(1.0, shade)), strong))
    return cells


def families(results: Results) -> Section | None:
    """Means over the tasks of each family."""
    blocks: list[Block] = []
    for setting in results.settings:
        there = set(results.tasks_of(setting))
        kept = {family: [task for task in tasks if task in there] for family, tasks in results.families.items()}
        kept = {family: tasks for family, tasks in kept.items() if tasks}
        if len(kept) < 2:
            continue
        rows = []
        for method in plain(results.methods(setting)):
            found = {family: results.mean(setting, method, tasks) for family, tasks in kept.items()}
            rows.append([Cell(method), *(figure(one) for one in found.values())])
        headings = [f"{family.replace('_', ' ')} ({len(tasks)})" for family, tasks in kept.items()]
        if rows:
            blocks.append(Table(TITLES[setting], ["method", *headings], rows))
    return Section("Families of tasks", blocks) if blocks else None


def beside_the_paper(results: Results) -> Section | None:
    """The paper's Table 3 in our figures beside the published ones."""
    reported = table_3()
    ours: list[Setting] = [setting for setting in ("iid", "held_out") if setting in results.settings]
    columns = [column for column in published()["table_3"]["columns"] if any(column in results.methods(s) for s in ours)]
    rows = []
    for task, figures in reported.items():
        setting = next((setting for setting in ours if task in results.tasks_of(setting)), None)
        if setting is None:
            continue
        found = {method: results.task(setting, method, task) for method in ("base", *columns)}
        cells = [Cell(task), figure(found["base"])]
        for method in columns:
            theirs = f"paper {figures[method]:.1f}" if method in figures else "paper –"
            one = found[method]
            cells.append(Cell(f"{one.value:.1f}" if one else "–", theirs))
        rows.append(cells)
    if not rows or not columns:
        return None
    note = Note(
        "Ours are of this fleet's base model, the paper's of Llama 2 7B: what can be compared is which method leads, not by "
        "how much. In the paper the columns from perfect on are LoraRetriever's, measured on 50 rows a task under another "
        "protocol, so its gains over them are not like for like; here every column answers the same rows. The second split "
        "of MNLI is not measured here."
    )
    caption = "Table 3 of arXiv 2602.21222: our figure, and the published one below it"
    return Section("Beside the paper", [note, Table(caption, ["task", "base", *columns], rows)])


def sweeps(results: Results) -> Section | None:
    """Methods measured with other settings than the fleet's: figures over p, k and density."""
    blocks: list[Block] = []
    for setting in results.settings:
        found: dict[str, dict[str, list[tuple[float, Estimate]]]] = {}
        for method in results.methods(setting):
            mean = results.mean(setting, method)
            if mean is not None and _is_swept(method):
                name, _, change = method.partition("@")
                knob, _, value = change.partition("=")
                found.setdefault(knob, {}).setdefault(name, []).append((float(value), mean))
        for knob, methods in found.items():
            curves = [Curve(name, sorted(points, key=lambda point: point[0])) for name, points in methods.items()]
            drawn = [curve for curve in curves if len(curve.points) > 1]
            if drawn:
                caption = f"{TITLES[setting]}: mean over the tasks by {SWEPT[knob]}"
                blocks += [Curves(caption, SWEPT[knob], drawn), _points_table(caption, drawn)]
    return Section("Sweeps", blocks) if blocks else None


def _points_table(caption: str, curves: Sequence[Curve]) -> Table:
    across = sorted({value for curve in curves for value, _ in curve.points})
    rows = [[Cell(c.name), *(figure(dict(c.points).get(value)) for value in across)] for c in curves]
    return Table(caption, ["method", *(f"{value:g}" for value in across)], rows)


def ground(results: Results) -> Section:
    """What the figures stand on: the base model against what is known of it, and how options are compared."""
    blocks: list[Block] = []
    rows = []
    for task, known in published()["base"].items():
        setting = next((s for s in results.settings if results.task(s, "base", task) is not None), None)
        if setting is None:
            continue
        own = results.task(setting, "base", task)
        assert own is not None
        rows.append([Cell(task), Cell(f"{own.value:.1f}", interval(own)), Cell(f"{known['figure']:.1f}"), Cell(known["of"])])
    if rows:
        caption = "The untouched base model, SmolLM2-135M-Instruct where nothing else is set"
        blocks.append(Table(caption, ["task", "here", "elsewhere", "where"], rows))
    chosen = []
    for task, choice in results.choices.items():
        shares = [Cell(f"{choice.accuracy[scoring]:.1f}", strong=scoring == choice.chosen) for scoring in choice.accuracy]
        chosen.append([Cell(task), Cell(choice.chosen), *shares, Cell(str(choice.rows))])
    if chosen:
        caption = "How options are compared: what base model and own adapter get right on training rows, by each scoring"
        headings = ["task", "chosen", *next(iter(results.choices.values())).accuracy, "predictions"]
        blocks.append(Table(caption, headings, chosen))
    else:
        blocks.append(
            Note("Options are compared as the catalogue declares: no choice on training rows was made for these figures.")
        )
    made = results.made_by
    facts = ", ".join(f"{name} {made[name]}" for name in ("base", "encoder", "device", "torch", "date") if name in made)
    blocks.append(Note(f"The newest predictions: {facts}."))
    if results.fleets > 1:
        blocks.append(
            Note(
                f"Warning: these predictions are of {results.fleets} different fleets; adapters or base model changed "
                "between them. Run the evaluation again: it computes anew what no longer holds."
            )
        )
    return Section("What the figures stand on", blocks)
