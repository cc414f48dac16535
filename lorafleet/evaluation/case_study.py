"""The case study of arXiv 2602.21222, section 7: one bare query, its weights, and the answer each method prefers."""

from typing import Any

from lorafleet.composition import BASE, Composition
from lorafleet.engine import ScoreRequest
from lorafleet.evaluation.bench import Bench
from lorafleet.evaluation.metrics import best_option
from lorafleet.evaluation.plan import retrieval_mark
from lorafleet.evaluation.records import digest
from lorafleet.storage import read_json, write_json
from lorafleet.weighing import Nucleus

QUERY = "Where can I buy a tennis ball?"
OPTIONS = {
    "ball": "You can purchase a tennis ball at any sports store.",
    "racket": "You can purchase a tennis racket at any sports store.",
}
METHODS = ("linear", "cat", "magnitude_prune", "ties")


def keep_case_study(bench: Bench) -> dict[str, Any]:
    """Ask, and keep what came of it, unless that is kept already.

    Returns:
        The query, the task weights, and by method the log-likelihood per token of both options and the one it prefers.
    """
    path = bench.folder / "case_study.json"
    adapters = [(adapter.name, adapter.stamp) for adapter in bench.roster.adapters.values()]
    settings = bench.settings
    mark = digest(
        QUERY, METHODS, settings.weighing.model_dump(), settings.composing.density, adapters, retrieval_mark(bench)
    )
    kept: dict[str, Any] | None = read_json(path)
    if kept is not None and kept["fingerprint"] == mark:
        return kept
    weighing = settings.weighing
    (neighbours,) = bench.nearest(bench.embed([QUERY]), weighing.neighbours)
    weights = Nucleus(weighing.p).weigh(neighbours, among=bench.pool())
    compositions: dict[str, Composition] = {"base": BASE}
    compositions |= {method: bench.composition(weights, settings, method) for method in METHODS}
    asked = [
        ScoreRequest(f"{QUERY}\nAnswer:", tuple(OPTIONS.values()), composition) for composition in compositions.values()
    ]
    methods: dict[str, Any] = {}
    options = list(OPTIONS)
    for method, scores in zip(compositions, bench.engine.score(asked), strict=True):
        by_option = {option: round(score.by("token"), 4) for option, score in zip(options, scores, strict=True)}
        methods[method] = {"scores": by_option, "prefers": options[best_option(scores, "token")]}
    found = {"fingerprint": mark, "query": QUERY, "weights": dict(weights), "methods": methods}
    write_json(path, found)
    return found
