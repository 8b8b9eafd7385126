"""Optimised Toeplitz factorizations: bands in C (BandMF), in C^-1 (BandInvMF), two (lambda-CGD).

One objective serves both families, with e the coefficients of C or of C^-1 and e_0 = 1:

    2 log rmse = log sens(C)^2 + log sum_j (1 - j/n) b_j^2,    b = a / c.

Its gradient costs one more division: a change de moves q = v / e by -(q / e) * de, so a gradient g
in q is the gradient -sum_j q_j h_{i+j} in e_i, where h is g divided by e from its end backwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeResult, minimize

from rootnoise import series
from rootnoise._check import real
from rootnoise.causal import Inverse, Toeplitz
from rootnoise.factorization.base import Factorization, Progress, Search, checked_bands, register
from rootnoise.participation import FixedCycle, MinSeparation, Participation
from rootnoise.patterns import comb
from rootnoise.workload import Workload

Array = NDArray[np.float64]
ValueAndGradient = tuple[float, Array]
Objective = Callable[[Array], ValueAndGradient]
# From the magnitudes of C to the indices of a sequence that covers them.
Cover = Callable[[Array], NDArray[np.intp]]

# What the objective is where C overflows, so that the line search steps back.
OVERFLOW = 1e4
# The largest reflection coefficient of a start; unstable ones are moved inside.
STABLE = 1 - 1e-9
# A squared sensitivity above that of the first pattern by more calls for the envelope.
MISSED = 1e-3


@register("banded")
def banded(
    workload: Workload,
    participation: Participation,
    bands: int | None = None,
    progress: Progress | None = None,
) -> Factorization:
    """C = p bands that minimise the error, from BSR on (scalable BandMF, McKenna 2024).

    For p <= b one person's columns are orthogonal, so the sensitivity is exact whatever the
    coefficients. For p > b it is exact for C >= 0 under a fixed cycle, which gains up to 0.4 %
    where people take part 20 to 100 times. Otherwise C would have to be non-increasing, and then
    the coefficients past b came out zero in every case tried: p = b is what is optimised.

    Raises:
        RootnoiseError: bands outside [1, n_steps], or a workload without a Toeplitz neighbour.

    >>> from rootnoise.workload import prefix_sum
    >>> banded(prefix_sum(6), FixedCycle(3, 2)).strategy.coefficients.round(3)
    array([1.   , 0.475, 0.299])
    """
    n = workload.n_steps
    p = checked_bands(bands, n, participation)
    b, _ = _separation(n, participation)
    a, left = workload.neighbour.matrix.column(0), np.arange(n, 0, -1.0) / n

    def objective(x: Array) -> ValueAndGradient:
        c = np.append(1.0, x)
        decoder, pull_back = _divide(a, c, n)
        error = float(left @ decoder**2), pull_back(2 * left * decoder)
        value, gradient = _log_product(_first_pattern(c, n, participation), error)
        return value, gradient[1:]

    def build(c: Array) -> Factorization:
        return Factorization("banded", workload, Toeplitz(c, n))

    search = Search(build, participation, progress)
    root = workload.square_root(p)
    search(root)
    if p > b and not isinstance(participation, FixedCycle):
        p = b
    least = 0.0 if p > b else None
    x = _minimise(objective, root[1:p] / root[0], search, [(least, None)] * (p - 1))
    search(np.append(1.0, x))
    return search.best


@register("banded-inverse")
def banded_inverse(
    workload: Workload,
    participation: Participation,
    bands: int | None = None,
    progress: Progress | None = None,
) -> Factorization:
    """C^-1 = p bands that minimise the error, from BISR on (BandInvMF, Kalinin et al. 2025).

    The first pattern of |C| is taken for the worst. For the minimum separation that is proven, pair
    by pair, after the fact; where it fails, the search goes on with the non-increasing envelope of
    |C|, a bound whatever C is. The result is the one whose rmse, as reported, is least.

    Raises:
        RootnoiseError: bands outside [1, n_steps], or a workload without a Toeplitz neighbour.
    """
    n = workload.n_steps
    p = checked_bands(bands, n, participation)
    a, left = workload.neighbour.matrix.column(0), np.arange(n, 0, -1.0) / n

    def objective(u: Array, cover: Cover) -> ValueAndGradient:
        d, pull_reflections = _from_reflections(np.tanh(u))
        decoder = series.multiply(a, d, n)
        error = float(left @ decoder**2), _correlate(a, 2 * left * decoder, p)
        c, pull_back = _divide(np.ones(1), d, n)
        at = cover(np.abs(c))
        square, g = _first_pattern(np.abs(c)[at], n, participation)
        g = np.bincount(at, g, minlength=n).astype(float) * np.sign(c)
        value, gradient = _log_product((square, pull_back(g)), error)
        return value, pull_reflections(gradient) / np.cosh(u) ** 2

    def build(d: Array) -> Factorization:
        return Factorization("banded-inverse", workload, Inverse(Toeplitz(d, n)))

    search = Search(build, participation, progress)
    start = series.invert(workload.square_root(p), p)
    search(start)
    u = np.arctanh(_reflections(start / start[0]))
    for cover in (_itself, _envelope):
        u = _minimise(partial(objective, cover=cover), u, search)
        d, _ = _from_reflections(np.tanh(u))
        search(d)
        least, _ = _first_pattern(np.abs(series.invert(d, n)), n, participation)
        if build(d).sensitivity(participation).value ** 2 <= least * (1 + MISSED):
            break
    return search.best


@register("lambda-cgd")
def lambda_cgd(
    workload: Workload,
    participation: Participation,
    lam: float | None = None,
    progress: Progress | None = None,
) -> Factorization:
    """C^-1 = 1 - lambda x: a step takes back a part of the last noise (Kalinin et al. 2026).

    Lambda (`lam`, in [0, 1)) is that of least error where None: `banded-inverse` with two bands.

    Raises:
        RootnoiseError: lam outside [0, 1).

    >>> from rootnoise.workload import prefix_sum
    >>> lambda_cgd(prefix_sum(4), FixedCycle(2, 2), lam=0.5).strategy.column(0)
    array([1.   , 0.5  , 0.25 , 0.125])
    """
    n = workload.n_steps
    if lam is None:
        best = banded_inverse(workload, participation, min(2, n), progress)
        return replace(best, mechanism="lambda-cgd")
    d = np.array([1.0, -real("lam", lam, at_least=0, below=1)])[:n]
    return Factorization("lambda-cgd", workload, Inverse(Toeplitz(d, n)))


def _minimise(
    objective: Objective,
    start: Array,
    search: Search,
    bounds: list[tuple[float | None, float | None]] | None = None,
) -> Array:
    """Return where L-BFGS from `start` ends."""

    def guarded(x: Array) -> ValueAndGradient:
        with np.errstate(all="ignore"):
            value, gradient = objective(x)
        if np.isfinite(value) and np.all(np.isfinite(gradient)):
            return value, gradient
        return OVERFLOW, np.zeros_like(x)

    def report(intermediate_result: OptimizeResult) -> None:
        search.report(float(np.exp(intermediate_result.fun / 2)))

    if start.size == 0:
        return start
    result = minimize(
        guarded,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        callback=report,
        # Smooth problems take 10 to 200 steps; kinks of |C| or its envelope would take thousands.
        options={"maxiter": 300, "maxcor": 20, "ftol": 1e-13, "gtol": 1e-9},
    )
    return np.asarray(result.x)


def _separation(n: int, participation: Participation) -> tuple[int, int]:
    """Return the separation b and the number k of one person's steps."""
    match participation:
        case MinSeparation(b, k) | FixedCycle(b, k) if k > 1:
            return b, k
    return n, 1


def _first_pattern(c: Array, n: int, participation: Participation) -> ValueAndGradient:
    """Return |sum_{j<k} C[:, jb]|^2 and its gradient, in O(n)."""
    b, k = _separation(n, participation)
    pattern = comb(c, n, b, k)
    pattern[n:] = 0.0
    # The gradient is the same sum in the other direction.
    return float(pattern @ pattern), 2 * comb(pattern[::-1], n, b, k)[::-1][: c.size]


def _itself(magnitudes: Array) -> NDArray[np.intp]:
    return np.arange(magnitudes.size)


def _envelope(magnitudes: Array) -> NDArray[np.intp]:
    """Return where each entry of the non-increasing envelope is taken from."""
    envelope = np.maximum.accumulate(magnitudes[::-1])[::-1]
    own = np.where(magnitudes == envelope, np.arange(magnitudes.size), magnitudes.size)
    return np.minimum.accumulate(own[::-1])[::-1]


def _divide(v: Array, e: Array, n: int) -> tuple[Array, Callable[[Array], Array]]:
    """Return q = v / e to n terms, and the map from a gradient in q to that in e."""
    q = series.divide(v, e, n)

    def pull_back(g: Array) -> Array:
        return -_correlate(q, series.divide(g[::-1], e, n)[::-1], e.size)

    return q, pull_back


def _correlate(x: Array, y: Array, size: int) -> Array:
    """Return sum_j x_j y_{i+j} for the lags 0 <= i < size."""
    n = x.size
    if size * n <= series.FILTER_WORK:
        return np.array([x[: n - i] @ y[i:] for i in range(size)])
    return series.multiply(x, y[::-1], n)[: -size - 1 : -1]


def _log_product(first: ValueAndGradient, second: ValueAndGradient) -> ValueAndGradient:
    (f, df), (g, dg) = first, second
    return float(np.log(f) + np.log(g)), df / f + dg / g


def _from_reflections(r: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Return the series with reflection coefficients r, and the map from its gradient to that in r.

    d <- d + r_m reverse(d), one coefficient longer each time (Levinson's recursion). All |r_m| < 1
    if and only if all zeros of d are outside the unit circle: C = 1/d does not explode (Schur).
    """
    stages = [np.ones(1)]
    for reflection in r:
        d = np.append(stages[-1], 0.0)
        stages.append(d + reflection * d[::-1])

    def pull_back(g: Array) -> Array:
        gradient = np.empty(r.size)
        for m in range(r.size - 1, -1, -1):
            gradient[m] = g[::-1] @ np.append(stages[m], 0.0)
            g = (g + r[m] * g[::-1])[:-1]
        return gradient

    return stages[-1], pull_back


def _reflections(d: Array) -> Array:
    """Return the reflection coefficients of d, d_0 = 1; moved inside (-1, 1) if d is not stable."""
    r = np.empty(d.size - 1)
    for m in range(r.size - 1, -1, -1):
        r[m] = np.clip(d[-1], -STABLE, STABLE)
        d = ((d - r[m] * d[::-1]) / (1 - r[m] ** 2))[:-1]
    return r
