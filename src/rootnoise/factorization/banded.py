"""Toeplitz strategies with optimised bands (BandMF), and what those of the inverse share.

One objective serves bands of C and of C^-1, with e their coefficients and e_0 = 1:

    2 log rmse = log sens(C)^2 + log sum_j (1 - j/n) b_j^2,    b = a / c.

Its gradient costs one more division: a change de moves q = v / e by -(q / e) * de, so a gradient g
in q is the gradient -sum_j q_j h_{i+j} in e_i, where h is g divided by e from its end backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rootnoise._check import Array
from rootnoise.causal import Toeplitz, series
from rootnoise.factorization.base import Factorization, Progress, Search, checked_bands, register
from rootnoise.factorization.lbfgs import Bound, ValueAndGradient, lbfgs
from rootnoise.participation import FixedCycle, MinSeparation, Participation
from rootnoise.participation.overlaps import comb
from rootnoise.workload import Workload

Objective = Callable[[Array], ValueAndGradient]


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
    b, _ = separation(n, participation)
    a, left = workload.neighbour.matrix.column(0), np.arange(n, 0, -1.0) / n

    def objective(x: Array) -> ValueAndGradient:
        c = np.append(1.0, x)
        decoder, pull_back = divide(a, c, n)
        error = float(left @ decoder**2), pull_back(2 * left * decoder)
        value, gradient = log_product(first_pattern(c, n, participation), error)
        return value, gradient[1:]

    def build(c: Array) -> Factorization:
        return Factorization("banded", workload, Toeplitz(c, n))

    search = Search(build, participation, progress)
    root = workload.square_root(p)
    search(root)
    if p > b and not isinstance(participation, FixedCycle):
        p = b
    least = 0.0 if p > b else None
    x = minimise(objective, root[1:p] / root[0], search, [(least, None)] * (p - 1))
    search(np.append(1.0, x))
    return search.best


def minimise(
    objective: Objective, start: Array, search: Search, bounds: Sequence[Bound] | None = None
) -> Array:
    """Return where L-BFGS from `start` ends."""
    return lbfgs(
        objective, start, ftol=1e-13, gtol=1e-9, bounds=bounds, report=search.report_objective
    )


def separation(n: int, participation: Participation) -> tuple[int, int]:
    """Return the separation b and the number k of one person's steps."""
    match participation:
        case MinSeparation(b, k) | FixedCycle(b, k) if k > 1:
            return b, k
    return n, 1


def first_pattern(c: Array, n: int, participation: Participation) -> ValueAndGradient:
    """Return |sum_{j<k} C[:, jb]|^2 and its gradient, in O(n)."""
    b, k = separation(n, participation)
    pattern = comb(c, n, b, k)
    pattern[n:] = 0.0
    # The gradient is the same sum in the other direction.
    return float(pattern @ pattern), 2 * comb(pattern[::-1], n, b, k)[::-1][: c.size]


def divide(v: Array, e: Array, n: int) -> tuple[Array, Callable[[Array], Array]]:
    """Return q = v / e to n terms, and the map from a gradient in q to that in e."""
    q = series.divide(v, e, n)

    def pull_back(g: Array) -> Array:
        return -correlate(q, series.divide(g[::-1], e, n)[::-1], e.size)

    return q, pull_back


def correlate(x: Array, y: Array, size: int) -> Array:
    """Return sum_j x_j y_{i+j} for the lags 0 <= i < size."""
    n = x.size
    if size * n <= series.FILTER_WORK:
        return np.array([x[: n - i] @ y[i:] for i in range(size)])
    return series.multiply(x, y[::-1], n)[: -size - 1 : -1]


def log_product(first: ValueAndGradient, second: ValueAndGradient) -> ValueAndGradient:
    """Return log(f g) and its gradient."""
    (f, df), (g, dg) = first, second
    return float(np.log(f) + np.log(g)), df / f + dg / g
