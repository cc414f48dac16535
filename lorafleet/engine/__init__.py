"""Generation and scoring on one model, every row of a batch with its own composition.

Reads from top to bottom: `requests` (what is asked and answered), `text` and `sampling` (tokens to text, logits to tokens),
`segments` (what a pass computes), `attention` and `cache` (the door to transformers' models, and what a cache offers),
`slotted_cache` and `paged_cache` (in plain torch, and for GPUs, with `paged_attention`), `fusing`, `graphs` and
`prompt_graphs` (fewer launches, for GPUs; `capture` makes the graphs), `runner` (one pass), `sequence` (a request on its
way), `loop` (who computes next), `engine` (the thread, and what others call). Knows tokens, caches and
compositions; knows nothing of tasks, of retrieval, or of who asks.
"""

from lorafleet.engine.engine import Engine
from lorafleet.engine.requests import (
    FinishReason,
    Generation,
    GenerationRequest,
    OptionScore,
    Piece,
    ScoreRequest,
    TokenChoice,
    ToldPrompt,
)
from lorafleet.engine.sequence import OnPiece

__all__ = [
    "Engine",
    "FinishReason",
    "Generation",
    "GenerationRequest",
    "OnPiece",
    "OptionScore",
    "Piece",
    "ScoreRequest",
    "TokenChoice",
    "ToldPrompt",
]
