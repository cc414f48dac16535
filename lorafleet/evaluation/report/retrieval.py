"""What the page says of retrieval: how often the own task is found, which other is taken for it, and what weights follow."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from lorafleet.evaluation.finding import RANKS, Ranked, accuracy
from lorafleet.evaluation.published import published
from lorafleet.evaluation.report.blocks import Block, Cell, Note, Section, Table, figure
from lorafleet.evaluation.report.comparison import plain
from lorafleet.evaluation.results import Results

FORMS = {"instruction": "with instruction", "fields": "with field names alone", "bare": "as bare text"}
WEIGHED_BY = ("auto", "linear", "cat", "softmax", "top_k")
SHOWN_PER_CENT = 0.5


def retrieval_accuracy(results: Results) -> Section | None:
    """The own task among the first 1, 3, 5 and 8, for every form of query."""
    families = results.all_families
    rows, by_task = [], []
    found_in = {form: _with_own_rows(results, form) for form in FORMS if _with_own_rows(results, form)}
    if not found_in:
        return None
    for form, ranked in found_in.items():
        cells = [figure(accuracy(results.bootstrap, ranked, rank)) for rank in RANKS]
        rows.append([Cell(FORMS[form]), *cells, figure(accuracy(results.bootstrap, ranked, 1, families))])
    for name, figures in published()["retrieval"].items():
        if name != "ranks":
            rows.append([Cell(f"published: {name}", "48 tasks"), *(Cell(f"{one:.1f}") for one in figures), Cell("–")])
    for task in next(iter(found_in.values())):
        cells = [Cell(task)]
        for ranked in found_in.values():
            for rank in (1, 3):
                one = accuracy(results.bootstrap, {task: ranked[task]}, rank)
                cells.append(Cell(f"{one.value:.0f}", shade=one.value / 100))
        by_task.append(cells)
    tasks = len(next(iter(found_in.values())))
    return Section(
        "Retrieval",
        [
            Note(
                "The rows of all tasks as queries, nothing masked: how often the own task is among the first, by the summed "
                "similarities of its neighbours. People write neither instructions nor field names: bare text is the query "
                "of real use."
            ),
            Table(
                f"The own task is found, in per cent, mean over {tasks} tasks",
                ["query", *(f"top {rank}" for rank in RANKS), "family first"],
                rows,
            ),
            Table(
                "By task: first, and among three",
                ["task", *(f"{FORMS[form]}, top {rank}" for form in found_in for rank in (1, 3))],
                by_task,
            ),
        ],
    )


def confusion(results: Results) -> Section | None:
    """Which task is found first for the rows of each."""
    blocks: list[Block] = []
    for form in ("instruction", "bare"):
        ranked = {
            task: results.retrieval.get(form, {})[task] for task in results.tasks if task in results.retrieval.get(form, {})
        }
        if not ranked:
            continue
        first = {task: _shares([{found[0][0]: 1.0} for found in rows if found]) for task, rows in ranked.items()}
        blocks.append(_heat(f"Queries {FORMS[form]}: the task found first, in per cent of the rows", results, first))
    return Section("Which task is taken for which", blocks) if blocks else None


def weights_by_task(results: Results) -> Section | None:
    """The mean weight that each adapter gets on the rows of each task."""
    blocks: list[Block] = []
    for setting in results.settings:
        methods = plain(results.methods(setting))
        method = next((name for name in WEIGHED_BY if name in methods), None)
        if method is None:
            continue
        judged = results.judged[setting][method]
        mean = {task: _shares(judged[task].weights) for task in results.tasks if task in judged}
        where = {"iid": "", "ood": ", own adapter masked", "held_out": ", tasks without an adapter"}[setting]
        blocks.append(_heat(f"Mean weight of each adapter, in per cent, as {method} weighs them{where}", results, mean))
    return Section("Weights by task", blocks) if blocks else None


def _with_own_rows(results: Results, form: str) -> dict[str, Ranked]:
    """The tasks whose rows can be found at all: a task without an adapter has none in the index."""
    ranked = results.retrieval.get(form, {})
    indexed = {other for rows in ranked.values() for found in rows for other, _ in found}
    return {task: ranked[task] for task in results.tasks if task in ranked and task in indexed}


def _shares(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    sums: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        for task, weight in row.items():
            sums[task] += 100 * weight / len(rows)
    return dict(sums)


def _heat(caption: str, results: Results, rows: Mapping[str, Mapping[str, float]]) -> Table:
    used = {task for row in rows.values() for task in row}
    columns = [*(task for task in results.tasks if task in used), *sorted(used - set(results.tasks))]
    cells = [
        [
            Cell(task),
            *(
                Cell(f"{row[other]:.0f}", shade=row[other] / 100, strong=other == task)
                if row.get(other, 0.0) >= SHOWN_PER_CENT
                else Cell("")
                for other in columns
            ),
        ]
        for task, row in rows.items()
    ]
    return Table(caption, ["task", *columns], cells, narrow=True)
