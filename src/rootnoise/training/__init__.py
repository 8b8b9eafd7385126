"""How is one private step made?"""

from rootnoise.training.optimizer import PrivateOptimizer, UnplannedOptimizerWarning, privatize

__all__ = ["PrivateOptimizer", "UnplannedOptimizerWarning", "privatize"]
