"""The optimal dense factorization, AOF of Denisov et al. (2022), for any workload and with its gap.

One participation and a fixed cycle are solved to optimality. There the optimal C has orthogonal
columns on the steps of one person, so that its sensitivity is exact: to demand X_ij = 0 of any two
of them adds a multiplier to each off-diagonal entry of the blocks of Y, which were free already, so
that the dual stays what it was. (Choquette-Choo et al. 2022 impose the zeros.) Every iterate of the
dual ascent is a lower bound that certifies the best strategy so far.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
from scipy.linalg import solve_triangular

from rootnoise._check import Array, integer, real
from rootnoise.bounds import dual
from rootnoise.causal import Dense
from rootnoise.factorization.bandmf import bandmf
from rootnoise.factorization.base import Factorization, Progress, Search, register
from rootnoise.factorization.square_root import bsr
from rootnoise.participation import CyclicPoisson, MinSeparation, MinSepPoisson, Participation
from rootnoise.workload import Workload

# An iteration takes about 10 n^3 multiply-adds: 0.6 s at n = 1024, 40 s at this size (one core).
LARGEST = 4096
MAX_ITERATIONS = 500


@register("dense")
def dense(
    workload: Workload,
    participation: Participation,
    tolerance: float = 1e-6,
    progress: Progress | None = None,
) -> Factorization:
    """C = whatever lower-triangular matrix has the least rmse (Denisov et al. 2022).

    Optimal up to `tolerance` for one participation and for a fixed cycle. For a minimal separation
    no optimum is known: it is the best C with `min_sep` bands, so that every pattern has orthogonal
    columns (`bandmf`). Cyclic Poisson sampling allows `groups` bands.

    Args:
        workload: at most 4096 steps, as the matrices are dense.
        participation: who may take part when.
        tolerance: the gap to the lower bound at which to stop.
        progress: called with the iteration and the gap; for a banded C, which has no bound, with
            the rmse.

    Raises:
        RootnoiseError: too many steps, or a tolerance outside (0, 1).
    """
    n = integer("n_steps", workload.n_steps, 1, LARGEST)
    tolerance = real("tolerance", tolerance, above=0, below=1)
    bands = _bands(n, participation)
    if bands < n:
        banded = bandmf(workload, participation, bands, tolerance, progress)
        return replace(banded, mechanism="dense")
    start = bsr(workload, participation).strategy
    search = Search(lambda c: Factorization("dense", workload, c), participation)
    search(start)
    a = workload.matrix.dense()
    search(Dense(_optimum(a, start.dense(), participation, tolerance, progress)))
    return search.best


def reverse_cholesky(gram: Array) -> Array:
    """Return the lower-triangular C with C^T C = gram: a causal strategy for any Gram matrix.

    Raises:
        numpy.linalg.LinAlgError: `gram` is not positive definite.

    >>> reverse_cholesky(np.array([[5.0, 2.0], [2.0, 4.0]]))
    array([[2., 0.],
           [1., 2.]])
    """
    return np.ascontiguousarray(np.linalg.cholesky(gram[::-1, ::-1]).T[::-1, ::-1])


def _bands(n: int, participation: Participation) -> int:
    """Return how many bands C may have for its sensitivity to be known."""
    match participation:
        case CyclicPoisson(min_sep=b) | MinSepPoisson(min_sep=b):
            return min(b, n)
        case MinSeparation(min_sep=b, max_participations=k) if k > 1:
            return b
    return n


def _optimum(
    a: Array,
    start: Array,
    participation: Participation,
    tolerance: float,
    progress: Progress | None,
) -> Array:
    """Return the best strategy for one participation or a fixed cycle."""
    patterns = dual.cycles(len(a), participation)
    problem = dual.Problem(a[:, :, None], patterns)
    best, least, bound = start, np.inf, 0.0
    points = dual.ascend(problem, _start(a, start, patterns))
    for iteration, point in enumerate(islice(points, MAX_ITERATIONS), 1):
        strategy, norm = _strategy(a, point.x, patterns)
        bound = max(bound, point.value)
        if norm < least:
            best, least = strategy, norm
        if progress is not None:
            progress(iteration, max(0.0, least / bound - 1))
        if least <= bound * (1 + tolerance):
            break
    return best


def _start(a: Array, start: Array, patterns: dual.Patterns) -> dual.Factors:
    """Return the dual point that makes X = C^T C stationary: the blocks of X^-1 A^T A X^-1."""
    inverse = solve_triangular(start, np.eye(len(a)), lower=True)
    half = inverse @ (inverse.T @ a.T)
    return dual.feasible(tuple(half[p] for p in patterns))


def _strategy(a: Array, x: Array, patterns: dual.Patterns) -> tuple[Array, float]:
    """Return a strategy of sensitivity 1 near the best one for a dual point, and its |B|_F."""
    # A step that the workload ignores leaves X singular; its column is scaled up again below.
    x = x + dual.DOUBT * x.max() * np.eye(len(x))
    orthogonal = x.copy()
    for p in patterns:
        orthogonal[p[:, :, None], p[:, None, :]] *= np.eye(p.shape[1])
    try:
        c = reverse_cholesky(orthogonal)
    except np.linalg.LinAlgError:  # far from the optimum: pay for correlations of either sign
        c = reverse_cholesky(x)
    norms = np.empty(len(a))
    for p in patterns:
        columns = c[:, p]
        overlaps = np.abs(np.einsum("tgi,tgj->gij", columns, columns, optimize=True))
        norms[p] = np.sqrt(overlaps.sum((1, 2)))[:, None]
    c /= norms
    return c, float(np.linalg.norm(solve_triangular(c, a.T, lower=True, trans="T")))
