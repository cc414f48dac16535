"""What the page says of errors: how often each method errs on rows of the paper's six kinds, and the case study."""

from lorafleet.evaluation.errors_by_rule import KINDS, error_rates, rows_of_kind
from lorafleet.evaluation.published import published
from lorafleet.evaluation.report.blocks import Block, Cell, Note, Section, Table, figure
from lorafleet.evaluation.report.comparison import plain
from lorafleet.evaluation.results import Results
from lorafleet.evaluation.tables import TITLES

SHADE_POINTS = 30.0


def error_analysis(results: Results) -> Section | None:
    """Error rates by kind of row, beside those on all rows."""
    kinds = [(kind, rows_of_kind(results, kind)) for kind in KINDS]
    everything = {task.name: set(task.rows) for task in results.tasks.values()}
    rules = Table(
        "The rules", ["kind", "a row is of the kind if"], [[Cell(kind.name), Cell(kind.rule)] for kind, _ in kinds]
    )
    blocks: list[Block] = [
        Note(
            "The paper read wrong answers by hand and named six kinds. Here rules name them, and they see the row alone, so "
            "that every kind has a rate: wrong answers in per cent of its rows, all rows counting the same. A row may be of "
            "several kinds. Colour tells the difference to the method's own rate on all rows: blue for fewer errors, red "
            "for more."
        ),
        rules,
    ]
    for setting in results.settings:
        rows = []
        counts = [0] * len(kinds)
        for method in plain(results.methods(setting)):
            overall = error_rates(results, setting, method, everything)
            if overall is None:
                continue
            cells = [Cell(method), figure(overall[0])]
            for place, (_, wanted) in enumerate(kinds):
                found = error_rates(results, setting, method, wanted) if wanted else None
                if found is None:
                    cells.append(Cell("–"))
                    continue
                counts[place] = max(counts[place], found[1])
                shade = (overall[0].value - found[0].value) / SHADE_POINTS
                cells.append(figure(found[0], max(-1.0, min(1.0, shade))))
            rows.append(cells)
        headings = [f"{kind.name} ({count:,} rows)" for (kind, _), count in zip(kinds, counts, strict=True)]
        if not rows:
            continue
        blocks.append(Table(f"{TITLES[setting]}: wrong answers, in per cent", ["method", "all rows", *headings], rows))
    return Section("Where methods err", blocks)


def case_study(results: Results) -> Section | None:
    """The tennis ball: weights and choices beside the paper's."""
    found, reported = results.case_study, published()["case_study"]
    if found is None:
        return None
    tasks = [*found["weights"], *(task for task in reported["weights"] if task not in found["weights"])]
    weights = [
        [
            Cell(task),
            Cell(f"{found['weights'].get(task, 0):.3f}", shade=found["weights"].get(task, 0)),
            Cell(f"{reported['weights'][task]:.3f}" if task in reported["weights"] else "–"),
        ]
        for task in tasks
    ]
    choices = []
    for method, said in found["methods"].items():
        scores = [Cell(f"{score:.3f}", strong=option == said["prefers"]) for option, score in said["scores"].items()]
        choices.append([Cell(method), Cell(said["prefers"]), *scores, Cell(reported["prefers"].get(method, "–"))])
    options = next(iter(found["methods"].values()))["scores"]
    return Section(
        "Case study",
        [
            Note(f"The paper's query, as people write it: “{found['query']}” The answer to prefer names the ball."),
            Table("Task weights", ["task", "here", "paper"], weights),
            Table("Log-likelihood per token of each answer", ["method", "prefers", *options, "paper"], choices),
        ],
    )
