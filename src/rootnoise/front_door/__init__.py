"""Private training in the loop that people already have.

`make_private` composes the public parts (planner, factorize, Mechanism, sampler, PrivateOptimizer),
so that every batch is still checked by the ledger. The loader knows which records it drew and tells
the optimizer; the loop itself never sees an index.
"""

from rootnoise.front_door.finished import accuracy, evaluate
from rootnoise.front_door.loop import LoopOptimizer, PrivateLoader
from rootnoise.front_door.making import Private, make_private

__all__ = ["LoopOptimizer", "Private", "PrivateLoader", "accuracy", "evaluate", "make_private"]
