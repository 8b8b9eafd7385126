"""Toeplitz strategies whose inverse has optimised bands (BandInvMF, lambda-CGD).

With d the p coefficients of C^-1, d_0 = 1, c those of C = 1/d, S the squared sensitivity and E the
squared error, the objective is 2 log rmse = log S(d) + log E(d). E = d^T M d is quadratic, and

    dc/dd_i = -x^i c^2,    d^2 c / dd_i dd_l = 2 x^(i+l) c^3,

so that the Hessian is exact in O(n p^2): Newton's method takes 5 to 20 steps where S is smooth.
It has kinks where entries of C change sign. There |c| is first (c^2 + eps^2)^(1/2), with eps
falling: all kinks are rounded, and S is never below its value.

Long series, too large for that, are searched by L-BFGS over reflection coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import toeplitz
from scipy.optimize import minimize

from rootnoise._check import Array, real
from rootnoise.causal import Inverse, Toeplitz, series
from rootnoise.factorization.banded import (
    correlate,
    divide,
    first_pattern,
    log_product,
    minimise,
    separation,
)
from rootnoise.factorization.base import Factorization, Progress, Search, checked_bands, register
from rootnoise.factorization.lbfgs import OVERFLOW, ValueAndGradient, reporting
from rootnoise.participation import Participation
from rootnoise.participation.sensitivity import sensitivity
from rootnoise.workload import Workload

# From the magnitudes of C to the indices of a sequence that covers them.
Cover = Callable[[Array], NDArray[np.intp]]

# Newton's method where n p^2 is at most this: 0.1 s a step.
NEWTON_WORK = 1_000_000_000
# Widths of the rounded kinks, and the most steps at each.
WIDTHS, MOST_STEPS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6), 60
# More bands than this are searched from the optimum of half as many.
FEW = 32
# The largest reflection coefficient of a start; unstable ones are moved inside.
STABLE = 1 - 1e-9
# Where the squared sensitivity exceeds that of the first pattern by more, the envelope is searched.
MISSED = 1e-3


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
    |C|, a bound whatever C is. The result is the one whose rmse, as reported, is least. Many bands
    start from the optimum of half as many, and are never worse.

    Raises:
        RootnoiseError: bands outside [1, n_steps], or a workload without a Toeplitz neighbour.
    """
    n = workload.n_steps
    most = checked_bands(bands, n, participation)

    def build(d: Array) -> Factorization:
        return Factorization("banded-inverse", workload, Inverse(Toeplitz(d, n)))

    search = Search(build, participation, progress)
    best, least = np.ones(1), np.inf
    for p in _sizes(most):
        best = np.append(best, np.zeros(p - best.size))
        root = series.invert(workload.square_root(p), p)
        value = search(root / root[0])
        if value < least:
            best, least = root / root[0], value
        for d in _optima(workload, participation, best, search):
            value = search(d)
            if value < least:
                best, least = d, value
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
    >>> from rootnoise.participation import FixedCycle
    >>> lambda_cgd(prefix_sum(4), FixedCycle(2, 2), lam=0.5).strategy.column(0)
    array([1.   , 0.5  , 0.25 , 0.125])
    """
    n = workload.n_steps
    if lam is None:
        best = banded_inverse(workload, participation, min(2, n), progress)
        return replace(best, mechanism="lambda-cgd")
    d = np.array([1.0, -real("lam", lam, at_least=0, below=1)])[:n]
    return Factorization("lambda-cgd", workload, Inverse(Toeplitz(d, n)))


def _sizes(bands: int) -> list[int]:
    """Return the numbers of bands to search one after the other, each half of the next."""
    return [*_sizes(bands // 2), bands] if bands > FEW else [bands]


def _optima(workload: Workload, who: Participation, d: Array, search: Search) -> Iterator[Array]:
    """Yield the optimum from d on; then, if some pattern is worse, that of the envelope."""
    n, p = workload.n_steps, d.size
    a = workload.neighbour.matrix.column(0)
    covers: list[Cover] = [_itself, _envelope]
    if n * p * p <= NEWTON_WORK:
        d = _newton(a, who, d, search)
        yield d
        if not _misses(workload, who, d):
            return
        covers = [_envelope]
    for cover in covers:
        objective = partial(_by_reflections, a, who, cover)
        u = minimise(objective, np.arctanh(_reflections(d)), search)
        d, _ = _from_reflections(np.tanh(u))
        yield d
        if not _misses(workload, who, d):
            return


def _misses(workload: Workload, who: Participation, d: Array) -> bool:
    """Return whether the sensitivity is more than that of the first pattern."""
    n = workload.n_steps
    least, _ = first_pattern(np.abs(series.invert(d, n)), n, who)
    return sensitivity(Inverse(Toeplitz(d, n)), who).value ** 2 > least * (1 + MISSED)


def _by_reflections(a: Array, who: Participation, cover: Cover, u: Array) -> ValueAndGradient:
    """Return the objective and its gradient at the reflection coefficients tanh(u)."""
    n, p = a.size, u.size + 1
    left = np.arange(n, 0, -1.0) / n
    d, pull_reflections = _from_reflections(np.tanh(u))
    decoder = series.multiply(a, d, n)
    error = float(left @ decoder**2), correlate(a, 2 * left * decoder, p)
    c, pull_back = divide(np.ones(1), d, n)
    at = cover(np.abs(c))
    square, g = first_pattern(np.abs(c)[at], n, who)
    g = np.bincount(at, g, minlength=n).astype(float) * np.sign(c)
    value, gradient = log_product((square, pull_back(g)), error)
    return value, pull_reflections(gradient) / np.cosh(u) ** 2


def _newton(a: Array, who: Participation, d: Array, search: Search) -> Array:
    """Return where Newton's method from d ends, in a trust region."""
    if d.size == 1:
        return d
    x = _from_reflections(_reflections(d))[0][1:]  # stable: C does not overflow
    for width in WIDTHS:
        smooth = _Smooth(a, d.size, who, width)
        found = minimize(
            smooth.value,
            x,
            jac=_finite(smooth.gradient),
            hess=_finite(smooth.hessian),
            method="trust-exact",
            callback=reporting(search.report_objective),
            options={"maxiter": MOST_STEPS, "gtol": 1e-8, "initial_trust_radius": 0.05},
        )
        x = found.x
    return np.append(1.0, x)


def _finite(derivative: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Return the derivative, 0 where C or a norm overflows, at points that SciPy then rejects."""

    def guarded(x: Array) -> Array:
        with np.errstate(all="ignore"):
            found = derivative(x)
            usable = np.isfinite(np.vdot(found, found))  # SciPy takes its norm
        return found if usable else np.zeros_like(found)

    return guarded


class _Smooth:
    """The objective of the first pattern, as a function of d_1, d_2, ..., with rounded kinks."""

    def __init__(self, a: Array, p: int, who: Participation, width: float) -> None:
        self._n, self._p, self._who, self._width = a.size, p, who, width
        left = np.arange(a.size, 0, -1.0) / a.size
        self._errors = (_shifts(a, p) * left) @ _shifts(a, p).T

    def _parts(self, x: Array) -> tuple[Array, Array, float, Array]:
        """Return c, (c^2 + eps^2)^(1/2), S and the gradient of S in the latter."""
        c = series.invert(np.append(1.0, x), self._n)
        rounded = np.hypot(c, self._width)
        square, g = first_pattern(rounded, self._n, self._who)
        return c, rounded, square, g

    def value(self, x: Array) -> float:
        """Return the objective; where C overflows, OVERFLOW."""
        d = np.append(1.0, x)
        with np.errstate(all="ignore"):
            value = np.log(self._parts(x)[2]) + np.log(d @ self._errors @ d)
        return float(value) if np.isfinite(value) else OVERFLOW

    def gradient(self, x: Array) -> Array:
        """Return the gradient."""
        c, rounded, square, g = self._parts(x)
        of_s, of_e = self._slopes(x, c, g * c / rounded, square)
        return (of_s + of_e)[1:]

    def _slopes(self, x: Array, c: Array, g: Array, square: float) -> tuple[Array, Array]:
        """Return the gradients of log S and log E, with g that of S in c."""
        d = np.append(1.0, x)
        pulled = self._errors @ d
        c2 = series.multiply(c, c, self._n)
        return -correlate(c2, g, self._p) / square, 2 * pulled / (d @ pulled)

    def hessian(self, x: Array) -> Array:
        """Return the Hessian."""
        n, p, d = self._n, self._p, np.append(1.0, x)
        c, rounded, square, g = self._parts(x)
        of_s, of_e = self._slopes(x, c, g * c / rounded, square)
        c2 = series.multiply(c, c, n)
        moves = _shifts(c2, p)  # -dc/dd
        kinks = (moves * (g * self._width**2 / rounded**3)) @ moves.T
        moves *= c / rounded
        b, k = separation(n, self._who)
        summed = moves.copy()
        for j in range(1, k):
            summed[:, j * b :] += moves[:, : n - j * b]
        lags = np.zeros(2 * p - 1)
        bent = correlate(series.multiply(c2, c, n), 2 * g * c / rounded, min(lags.size, n))
        lags[: bent.size] = bent
        hankel = lags[np.add.outer(np.arange(p), np.arange(p))]
        full = (2 * summed @ summed.T + kinks + hankel) / square - np.outer(of_s, of_s)
        full += 2 * self._errors / (d @ self._errors @ d) - np.outer(of_e, of_e)
        return np.asarray(full[1:, 1:])


def _shifts(x: Array, p: int) -> Array:
    """Return x moved by 0, 1, ..., p - 1, shape (p, n)."""
    return toeplitz(np.append(x[0], np.zeros(p - 1)), x)


def _itself(magnitudes: Array) -> NDArray[np.intp]:
    return np.arange(magnitudes.size)


def _envelope(magnitudes: Array) -> NDArray[np.intp]:
    """Return where each entry of the non-increasing envelope is taken from."""
    envelope = np.maximum.accumulate(magnitudes[::-1])[::-1]
    own = np.where(magnitudes == envelope, np.arange(magnitudes.size), magnitudes.size)
    return np.minimum.accumulate(own[::-1])[::-1]


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
