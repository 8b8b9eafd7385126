"""From coarse to fine: where to start the ascent of a dense dual problem, at little cost.

Steps are joined two by two, up to a problem of few hundred; its solution starts the next finer one.
An iteration at half the size takes an eighth of the time, and the best contributions of one person
change slowly with time, so that one or two iterations are left for the whole problem. Any start is
feasible: nothing here can make a bound wrong.
"""

from __future__ import annotations

from itertools import islice

import numpy as np
from numpy.typing import NDArray

from rootnoise._check import Array
from rootnoise.bounds import dual
from rootnoise.bounds.dual import Factors, Patterns
from rootnoise.participation import FixedCycle, MinSeparation, Participation

Indices = NDArray[np.intp]

# From here on joining pays: an iteration takes 15 ms at this size and 90 ms at twice as much.
WHOLE = 320
# Iterations of the coarsest problem, and of those between. All are cheap.
COARSEST, BETWEEN = 20, 6
# Patterns of less than this part of the mean weight are not followed up.
NEGLIGIBLE = 1e-6


def start(
    a: Array, participation: Participation, worst: bool = False
) -> tuple[Patterns, Factors | None, Array | None]:
    """Return the patterns to use for the workload a, shape (n, n), a point, and its weights.

    For disjoint patterns they are all that there are; under a minimal separation those that the
    coarser problem found to matter.
    """
    n = len(a)
    joined = _join(n, participation) if n > WHOLE else None
    if joined is None:
        return dual.patterns(n, participation), None, None
    first, coarser = joined
    sizes = np.diff(first, append=n)
    pooled = np.add.reduceat(np.add.reduceat(a, first, axis=0), first, axis=1)
    pooled /= np.sqrt(np.outer(sizes, sizes))
    patterns, begin, weights = start(pooled, coarser, worst)
    problem = dual.Problem(pooled[:, :, None], patterns, worst=worst)
    points = dual.ascend(problem, begin, weights)
    tries = islice(points, COARSEST if begin is None else BETWEEN)
    best = max(tries, key=lambda point: point.value)
    weights = np.repeat(best.weights / sizes, sizes) if worst else None
    return *_split(heaviest(patterns, best.factors), first, sizes), weights


def heaviest(patterns: Patterns, factors: Factors) -> tuple[Patterns, Factors]:
    """Leave out the patterns that hardly matter: most do not, where many overlap."""
    heavy = [np.square(f[:, 0, 0]) * len(f) > NEGLIGIBLE for f in factors]
    return (
        tuple(p[keep] for p, keep in zip(patterns, heavy, strict=True)),
        tuple(f[keep] for f, keep in zip(factors, heavy, strict=True)),
    )


def _join(n: int, participation: Participation) -> tuple[Indices, Participation] | None:
    """Return the first step of each pair and who takes part in pairs; None if steps do not pair."""
    if isinstance(participation, FixedCycle):
        # In every period the same: one of odd length ends with a single step.
        b, k = participation.period, participation.epochs
        first = np.flatnonzero(np.arange(n) % b % 2 == 0)
        return (first, FixedCycle(-(-b // 2), k)) if b > 1 else None
    first = np.arange(0, n, 2)
    if isinstance(participation, MinSeparation) and participation.max_participations > 1:
        b, k = -(-participation.min_sep // 2), participation.max_participations
        return (first, MinSeparation(b, k)) if (k - 1) * b < len(first) else None
    return first, participation


def _split(
    found: tuple[Patterns, Factors], first: Indices, sizes: Indices
) -> tuple[Patterns, Factors]:
    """Return the patterns of single steps, each with half the weight of its pattern of pairs."""
    by_length: dict[int, list[tuple[Indices, Array]]] = {}
    for pairs, factors in zip(*found, strict=True):
        for late in (0, 1):
            # Only the last pair of a pattern can be a single step: it has no second one.
            whole = (sizes[pairs] > late).sum(axis=1)
            for length in np.unique(whole[whole > 0]):
                own = whole == length
                steps = first[pairs[own, :length]] + late
                by_length.setdefault(int(length), []).append(
                    (steps, factors[own, :length, :length])
                )
    parts = [by_length[length] for length in sorted(by_length, reverse=True)]
    return (
        tuple(np.concatenate([steps for steps, _ in part]) for part in parts),
        dual.feasible(tuple(np.concatenate([factor for _, factor in part]) for part in parts)),
    )
