from .fleet import Fleet
from .weighing import TaskWeights

__all__ = ["Fleet", "TaskWeights"]
