"""Square-root factorizations: the root, its bands (BSR), those of its inverse (BISR), powers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from rootnoise._check import real
from rootnoise.causal import Inverse, Toeplitz, series
from rootnoise.factorization.base import (
    Factorization,
    Progress,
    Search,
    checked_bands,
    default_bands,
    register,
)
from rootnoise.participation import Participation, PoissonSampling
from rootnoise.workload import SGD, Workload

Bands = int | Literal["auto"]

# bands="auto" tries every p up to here, for half a second; beyond it goes from coarse to fine.
# Errors of workloads that are not Toeplitz take 10 times as long: at 480 steps all p took 1.6 to
# 4 s, and coarse to fine had the same p in 14 of 14 cases of 240 to 500 steps.
SCAN, SCAN_IN_GENERAL = 1024, 64


@register("square-root")
def square_root(workload: Workload, participation: Participation) -> Factorization:
    """C = B = A^(1/2) (Fichtenberger, Henzinger & Upadhyay 2023; Henzinger & Upadhyay 2025)."""
    n = workload.n_steps
    root = workload.root(n)
    exact = root if workload.root_is_exact else None
    return Factorization("square-root", workload, root, known_decoder=exact)


@register("bsr")
def bsr(
    workload: Workload,
    participation: Participation,
    bands: Bands | None = None,
    progress: Progress | None = None,
) -> Factorization:
    """C = the first p bands of A^(1/2), B = A C^-1 (Kalinin & Lampert 2024).

    Bands "auto" take the p of least error. That is the separation b, the default, while one person
    takes part up to about ten times; for more participations it moves to two or three times b.
    """
    n = workload.n_steps

    def build(p: int) -> Factorization:
        root = workload.root(p)
        exact = root if p == n and workload.root_is_exact else None
        return Factorization("bsr", workload, root, known_decoder=exact)

    return _with_bands(build, bands, workload, participation, progress)


@register("bisr")
def bisr(
    workload: Workload,
    participation: Participation,
    bands: Bands | None = None,
    progress: Progress | None = None,
) -> Factorization:
    """C^-1 = the first p bands of A^(-1/2) (Kalinin, McKenna, Upadhyay & Lampert 2025).

    A step sums its p latest noises. Bands "auto" take the p of least error, often b/2 to 2b.

    >>> from rootnoise.participation import SingleParticipation
    >>> from rootnoise.workload import prefix_sum
    >>> bisr(prefix_sum(4), SingleParticipation(), bands=3).noising.column(0)
    array([ 1.   , -0.5  , -0.125,  0.   ])
    """
    n = workload.n_steps

    def build(p: int) -> Factorization:
        noising = Toeplitz(_power(workload, -0.5, p), n)
        return Factorization("bisr", workload, Inverse(noising))

    return _with_bands(build, bands, workload, participation, progress)


@register("bsr-gamma")
def bsr_gamma(
    workload: Workload,
    participation: Participation,
    bands: int | None = None,
    gamma: float | None = None,
    progress: Progress | None = None,
) -> Factorization:
    """C = the first p bands of A^gamma; gamma in [0, 1] is that of least error where None.

    Gamma 1/2 is BSR, and the search starts there, so it is never worse. For p <= b one person's
    columns are orthogonal whatever the coefficients, so that they need not fall. The more often
    people take part, the larger is gamma, and the gain: 0.54, 0.58 and 0.61 for 5, 10 and 20 times,
    with 1, 4 and 8 % less error (prefix sums, b = 100).

    Raises:
        RootnoiseError: gamma outside [0, 1], or bands outside [1, n_steps].
    """
    n = workload.n_steps
    p = checked_bands(bands, n, participation)

    def build(gamma: float) -> Factorization:
        strategy = Toeplitz(_power(workload, gamma, p), n)
        return Factorization("bsr-gamma", workload, strategy)

    if gamma is not None:
        return build(real("gamma", gamma, at_least=0, at_most=1))
    search = Search(build, participation, progress)
    search(0.5)
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # too large a gamma makes C^-1 grow beyond float64: it loses
        minimize_scalar(search, bounds=(0.0, 1.0), method="bounded", options={"xatol": 1e-5})
    return search.best


def _power(workload: Workload, exponent: float, size: int) -> NDArray[np.float64]:
    """Return the first coefficients of A^exponent, or of its Toeplitz neighbour."""
    work = workload.neighbour
    if isinstance(work, SGD):
        return series.sgd_power(work.decay, work.momentum, exponent, size)
    return series.power(work.square_root(size), 2 * exponent, size)


def _with_bands(
    build: Callable[[int], Factorization],
    bands: Bands | None,
    workload: Workload,
    participation: Participation,
    progress: Progress | None,
) -> Factorization:
    n = workload.n_steps
    if bands != "auto":
        return build(checked_bands(bands, n, participation))
    search = Search(build, participation, progress)
    start = default_bands(n, participation)
    # Poisson sampling is accounted for up to that many bands only.
    most = start if isinstance(participation, PoissonSampling) else n
    tried = {start: search(start)}
    scan = SCAN if workload.matrix.is_toeplitz else SCAN_IN_GENERAL
    points = np.arange(1, most + 1) if most <= scan else np.geomspace(1, most, 24).astype(int)
    while True:
        tried |= {p: search(p) for p in sorted(set(points.tolist()) - set(tried))}
        order = sorted(tried)
        at = order.index(min(order, key=tried.__getitem__))
        low, high = order[max(0, at - 1)], order[min(len(order) - 1, at + 1)]
        if high - low <= max(2, order[at] // 50):  # the error is flat around its minimum
            return search.best
        points = np.linspace(low, high, 9).astype(int)
