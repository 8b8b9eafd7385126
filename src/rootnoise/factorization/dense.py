"""The optimal dense factorization, AOF of Denisov et al. (2022), for any workload and with its gap.

One participation and a fixed cycle are solved to optimality. There the optimal C has orthogonal
columns on the steps of one person, so that its sensitivity is exact: to demand X_ij = 0 of any two
of them adds a multiplier to each off-diagonal entry of the blocks of Y, which were free already, so
that the dual stays what it was. (Choquette-Choo et al. 2022 impose the zeros.) Every iterate of the
dual ascent is a lower bound that certifies the best strategy so far.
"""

from __future__ import annotations

from itertools import islice

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.optimize import OptimizeResult, minimize

from rootnoise import dual
from rootnoise._check import integer, real
from rootnoise.causal import Dense
from rootnoise.factorization.base import Factorization, Progress, Search, factorize, register
from rootnoise.participation import CyclicPoisson, MinSeparation, Participation
from rootnoise.workload import Workload

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

# An iteration takes about 10 n^3 multiply-adds: 0.6 s at n = 1024, 40 s at this size (one core).
LARGEST = 4096
MAX_ITERATIONS = 500


@register("dense")
def dense(
    workload: Workload,
    participation: Participation,
    tolerance: float = 1e-4,
    progress: Progress | None = None,
) -> Factorization:
    """C = whatever lower-triangular matrix has the least rmse (Denisov et al. 2022).

    Optimal up to `tolerance` for one participation and for a fixed cycle. For a minimal separation
    no optimum is known: it is the best C with `min_sep` bands, so that every pattern has orthogonal
    columns (BandMF, Choquette-Choo et al. 2023). Cyclic Poisson sampling allows `groups` bands.

    Args:
        workload: at most 4096 steps, as the matrices are dense.
        participation: who may take part when.
        tolerance: the gap to the lower bound at which to stop.
        progress: called with the iteration and the gap; for a banded C, where no bound is at hand,
            with the relative gain of the iteration.

    Raises:
        RootnoiseError: too many steps, or a tolerance outside (0, 1).
    """
    n = integer("n_steps", workload.n_steps, 1, LARGEST)
    tolerance = real("tolerance", tolerance, above=0, below=1)
    a = workload.matrix.dense()
    start = factorize(workload, participation, "bsr").strategy
    search = Search(lambda c: Factorization("dense", workload, c), participation)
    search(start)
    bands, epochs = _banding(n, participation)
    if bands < n:
        strategy = _banded(a, start.dense(), bands, epochs, tolerance, progress)
    else:
        strategy = _optimum(a, start.dense(), participation, tolerance, progress)
    search(Dense(strategy))
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


def _banding(n: int, participation: Participation) -> tuple[int, Indices]:
    """Return how many bands C may have, and for each step a window that a person enters once."""
    match participation:
        case CyclicPoisson(groups=groups):
            return min(groups, n), np.zeros(n, np.intp)
        case MinSeparation(min_sep=b, max_participations=k) if k > 1:
            # With more windows than participations a person would pick those of the largest norm.
            return b, np.arange(n) // b if n <= k * b else np.zeros(n, np.intp)
    return n, np.zeros(n, np.intp)


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


def _banded(
    a: Array,
    start: Array,
    bands: int,
    windows: Indices,
    tolerance: float,
    progress: Progress | None,
) -> Array:
    """Return the best strategy with few bands whose columns have equal norms within a window.

    L-BFGS on the entries E in the band and the logarithms of the windows' norms s; C is E with its
    columns scaled to them. The objective is log |B|_F^2 + log sum s^2, where B = A C^-1 changes by
    -B dC C^-1, so that the gradient of |B|_F^2 is -2 B^T B C^-T.
    """
    n = len(a)
    rows, columns = np.nonzero(np.tri(n) - np.tri(n, k=-bands))
    count = int(windows.max()) + 1

    def strategy(u: Array) -> tuple[Array, Array, Array]:
        c, s = np.zeros((n, n)), np.exp(u[:count])
        c[rows, columns] = u[count:]
        scale = s[windows] / np.linalg.norm(c, axis=0)
        return c * scale, scale, s

    def objective(u: Array) -> tuple[float, Array]:
        c, scale, s = strategy(u)
        decoder = solve_triangular(c, a.T, lower=True, trans="T")  # B^T
        error, squares = float(np.vdot(decoder, decoder)), s * s
        slope = solve_triangular(c, decoder @ decoder.T, lower=True).T * (-2 / error)
        along = (slope * c).sum(0)
        # Along a column lies the change of its window's norm; across, that of its direction.
        of_norms = np.bincount(windows, along, count) + 2 * squares / squares.sum()
        of_entries = (slope - c * (along / squares[windows])) * scale
        value = float(np.log(error * squares.sum()))
        return value, np.append(of_norms, of_entries[rows, columns])

    def report(intermediate_result: OptimizeResult) -> None:
        values.append(float(intermediate_result.fun))
        if progress is not None:
            progress(len(values) - 1, float(np.expm1((values[-2] - values[-1]) / 2)))

    first: Array = np.append(np.zeros(count), start[rows, columns])
    values = [objective(first)[0]]
    found = minimize(
        objective,
        first,
        jac=True,
        method="L-BFGS-B",
        callback=report,
        options={"maxiter": MAX_ITERATIONS, "maxcor": 20, "ftol": tolerance / 100, "gtol": 0.0},
    )
    return strategy(np.asarray(found.x))[0]
