"""How is one private step made?"""

from rootnoise.training.optimizer import PrivateOptimizer, privatize

__all__ = ["PrivateOptimizer", "privatize"]
