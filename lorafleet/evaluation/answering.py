"""The engine's answers to rows: the likelihood of every option, or a continuation."""

from collections.abc import Sequence
from dataclasses import dataclass

from lorafleet.composition import Composition
from lorafleet.engine import GenerationRequest, OptionScore, ScoreRequest
from lorafleet.evaluation.bench import Bench, Rows


@dataclass(frozen=True)
class Answer:
    """What a method answered to a row.

    Attributes:
        composition: what answered.
        options: the log-likelihood of every option; empty for a free-text question.
        text: what was generated for a free-text question.
    """

    composition: Composition
    options: tuple[OptionScore, ...] = ()
    text: str | None = None


def by_engine(bench: Bench, rows: Rows, compositions: Sequence[Composition]) -> list[Answer]:
    """All rows at once, those with the same adapters one behind the other: what is prepared for one serves the next.

    The answer to a free-text question ends with its line.
    """
    order = sorted(range(len(compositions)), key=lambda place: sorted(compositions[place].weights))
    examples = [rows.examples[place] for place in order]
    composed = [compositions[place] for place in order]
    if rows.task.answers is None:
        asked = [ScoreRequest(e.prompt, e.options, c) for e, c in zip(examples, composed, strict=True)]
        found = [Answer(c, tuple(scores)) for c, scores in zip(composed, bench.engine.score(asked), strict=True)]
    else:
        limit = bench.settings.evaluation.answer_tokens
        prompts = [GenerationRequest(e.prompt, c, limit, stop=("\n",)) for e, c in zip(examples, composed, strict=True)]
        found = [Answer(c, text=g.checked().text) for c, g in zip(composed, bench.engine.generate(prompts), strict=True)]
    answers = dict(zip(order, found, strict=True))
    return [answers[place] for place in range(len(order))]
