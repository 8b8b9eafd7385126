"""Which mechanism to train with: all that fit a job and its memory, by expected error."""

from rootnoise.planner.advice import advised_rate, learning_rate
from rootnoise.planner.job import (
    AMPLIFIED,
    CONTRACTION,
    MEMORY_ROWS,
    PLAIN,
    SLIGHT,
    WORTH,
    Job,
    Plan,
    Planned,
    Row,
)
from rootnoise.planner.objective import OBJECTIVES
from rootnoise.planner.search import (
    AFFORDABLE,
    AFFORDABLE_IN_GENERAL,
    candidates,
    plan,
    samplings,
)
from rootnoise.planner.sizing import Fleet, Size, Speed

__all__ = [
    "AFFORDABLE",
    "AFFORDABLE_IN_GENERAL",
    "AMPLIFIED",
    "CONTRACTION",
    "MEMORY_ROWS",
    "OBJECTIVES",
    "PLAIN",
    "SLIGHT",
    "WORTH",
    "Fleet",
    "Job",
    "Plan",
    "Planned",
    "Row",
    "Size",
    "Speed",
    "advised_rate",
    "candidates",
    "learning_rate",
    "plan",
    "samplings",
]
