"""How is one private step made?"""

from rootnoise.training.optimizer import (
    IgnoredPenaltyWarning,
    PrivateOptimizer,
    UnplannedOptimizerWarning,
)
from rootnoise.training.wrapping import privatize

__all__ = ["IgnoredPenaltyWarning", "PrivateOptimizer", "UnplannedOptimizerWarning", "privatize"]
