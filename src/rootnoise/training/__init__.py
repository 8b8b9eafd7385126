"""How is one private step made?"""

from rootnoise.training.optimizer import PrivateOptimizer, UnplannedOptimizerWarning
from rootnoise.training.wrapping import privatize

__all__ = ["PrivateOptimizer", "UnplannedOptimizerWarning", "privatize"]
