"""Which mechanism to train with: all that fit a job and its memory, by expected error."""

from rootnoise.planner.job import AMPLIFIED, MEMORY_ROWS, PLAIN, Job, Plan, Planned, Row
from rootnoise.planner.search import AFFORDABLE, candidates, plan, samplings
from rootnoise.planner.sizing import Fleet, Size, Speed

__all__ = [
    "AFFORDABLE",
    "AMPLIFIED",
    "MEMORY_ROWS",
    "PLAIN",
    "Fleet",
    "Job",
    "Plan",
    "Planned",
    "Row",
    "Size",
    "Speed",
    "candidates",
    "plan",
    "samplings",
]
