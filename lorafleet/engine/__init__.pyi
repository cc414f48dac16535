from .engine import Engine
from .requests import (
    FinishReason,
    Generation,
    GenerationRequest,
    OptionScore,
    Piece,
    ScoreRequest,
    TokenChoice,
    ToldPrompt,
)
from .sequence import OnPiece

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
