"""Binary trees: log2(n) rows of memory. The map itself is `Tree`."""

from __future__ import annotations

from rootnoise.causal.tree import Tree
from rootnoise.factorization.base import Factorization, register
from rootnoise.participation import Participation
from rootnoise.workload import Workload


@register("tree")
def tree(
    workload: Workload, participation: Participation, estimator: str = "full"
) -> Factorization:
    """C^-1 = the noise of a binary tree (Honaker 2015), with log2(n) rows of memory.

    "full" has the error of the full-variance estimator, yet runs online; "online" is Honaker's own
    online form, and "naive" adds up the fewest blocks. See `Tree`.

    Raises:
        RootnoiseError: another estimator.
    """
    return Factorization("tree", workload, Tree(workload.n_steps, estimator))
