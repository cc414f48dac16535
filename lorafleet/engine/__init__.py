"""Generation and scoring on one model, every row of a batch with its own composition.

Knows tokens, caches and compositions; knows nothing of tasks, of retrieval, or of who asks.
"""

from lorafleet.engine.engine import Engine
from lorafleet.engine.requests import Generation, GenerationRequest, OptionScore, ScoreRequest

__all__ = ["Engine", "Generation", "GenerationRequest", "OptionScore", "ScoreRequest"]
