"""Private training in an existing training loop.

`make_private` combines the public parts (planner, factorize, Mechanism, sampler, PrivateOptimizer),
so that the ledger checks every batch as usual. The loader tells the optimizer which records it
drew; the loop itself never sees an index.
"""

from rootnoise.front_door.evaluation import accuracy, evaluate
from rootnoise.front_door.loop import LoopOptimizer, PrivateLoader
from rootnoise.front_door.making import Private, make_private

__all__ = ["LoopOptimizer", "Private", "PrivateLoader", "accuracy", "evaluate", "make_private"]
