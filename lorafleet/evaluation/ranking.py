"""Which tasks a query finds, before a weigher cuts any off."""

from lorafleet.config import Settings
from lorafleet.evaluation.bench import Bench, Rows
from lorafleet.evaluation.queries import QueryForm
from lorafleet.weighing import LEARNED, make_weigher, sharpened, task_shares


def ranked(bench: Bench, rows: Rows, settings: Settings, form: QueryForm) -> list[dict[str, float]]:
    """Each row's tasks with their shares, the heaviest first; without the masked one.

    They are the weights of all tasks where the settings weigh by a learned router, else shares of the neighbours.
    """
    weighing = settings.weighing
    if weighing.weigher in LEARNED:
        within = [task for task in bench.indexed if task != rows.masked]
        weigher = make_weigher(weighing.weigher, {**weighing.model_dump(), "k": len(within), "abstain_below": 0})
        found = bench.evidence(rows, weighing.neighbours, form, learned=True)
        return [dict(weigher.weigh(evidence, within)) for evidence in found]
    near = bench.neighbours(rows, weighing.neighbours, form)
    return [task_shares(sharpened(one, weighing.sharpness)) for one in near]
