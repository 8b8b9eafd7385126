"""HOW FAR one person moves C X: the l2 sensitivity of a strategy under a participation.

With X = C^T C and contributions of norm at most 1,

    sens^2 = max over patterns pi of the largest sum_{s,t in pi} <u_s, u_t> X_st, |u_t| <= 1,

which is the sum of the X_st where they are non-negative and at most the sum of their absolute
values otherwise. Every answer says whether it is exact or an upper bound; none is ever too small.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.signal import correlate

from rootnoise._check import Array, RootnoiseError
from rootnoise.causal import CausalMatrix
from rootnoise.causal.tree import Tree, cycle_squares, most_squares
from rootnoise.participation.kinds import (
    CyclicPoisson,
    FixedCycle,
    MinSeparation,
    MinSepPoisson,
    Participation,
    SingleParticipation,
)
from rootnoise.participation.overlaps import comb, worst_cycle, worst_pattern

# Auto-correlations for the pairwise bound take about 100 ns a step and participation.
PAIRWISE_WORK = 2**27
# Sums of FFT products carry this relative error; the pairwise test must not fail because of it.
ROUNDING = 1e-12
# Steps of the largest Gram matrix: 0.5 GB, and 20 s.
DENSE = 2**13


@dataclass(frozen=True)
class Sensitivity:
    """The largest l2 change of C X by one person with gradients of norm at most 1.

    Attributes:
        value: the root, not its square.
        exact: False where `value` is an upper bound.
        method: how it was found.
    """

    value: float
    exact: bool
    method: str


def sensitivity(strategy: CausalMatrix, participation: Participation) -> Sensitivity:
    """Return how far one person moves C X: exact where a theorem says so, else an upper bound.

    For `CyclicPoisson` and `MinSepPoisson` it is the largest column norm, the sensitivity of one
    participation (Choquette-Choo et al. 2023, Theorem 4), and the strategy must have at most
    `groups`, or `min_sep`, bands.

    Raises:
        RootnoiseError: the participation does not fit n_steps, or the bands exceed the groups.

    >>> from rootnoise.causal import Toeplitz
    >>> sensitivity(Toeplitz(np.array([1.0, 0.5, 0.375]), 9), FixedCycle(period=3, epochs=3)).value
    2.042516...
    """
    refuse_misfit(strategy, participation)
    if isinstance(participation, SingleParticipation | CyclicPoisson | MinSepPoisson):
        return _largest_column(strategy)
    if participation.max_participations == 1:
        return _largest_column(strategy)
    if strategy.bands <= participation.min_sep:
        squares = np.square(strategy.column_norms())
        return Sensitivity(_root(_best_pattern(squares, participation)), True, "orthogonal columns")
    if strategy.coefficients is not None:
        return _toeplitz(strategy, strategy.coefficients, participation)
    found = _worst(strategy, participation)
    if found is None and isinstance(strategy, Tree):
        return _tree(strategy, participation)
    if found is None and strategy.n_steps > DENSE:
        bound = _best_pattern(strategy.column_norms(), participation)  # triangle inequality
        return Sensitivity(bound, False, "sum of column norms")
    return found or _gram(strategy.dense(), participation)


def refuse_misfit(strategy: CausalMatrix, participation: Participation) -> None:
    """Refuse a strategy whose columns overlap where the accountant relies on their being disjoint.

    Raises:
        RootnoiseError: the participation does not fit n_steps, or the bands exceed the groups.
    """
    participation.validate(strategy.n_steps)
    match participation:
        case CyclicPoisson(groups=groups):
            _refuse_overlaps(strategy, groups, "groups", "cyclic")
        case MinSepPoisson(min_sep=min_sep):
            _refuse_overlaps(strategy, min_sep, "min_sep", "min-sep")


def _refuse_overlaps(strategy: CausalMatrix, most: int, name: str, kind: str) -> None:
    if strategy.bands > most:
        raise RootnoiseError(
            f"bands must be in [1, {name}={most}] under {kind} Poisson sampling, "
            f"got {strategy.bands}"
        )


def _largest_column(strategy: CausalMatrix) -> Sensitivity:
    return Sensitivity(float(strategy.column_norms().max()), True, "largest column norm")


def _best_pattern(gains: Array, participation: FixedCycle | MinSeparation) -> float:
    """Return the largest sum of `gains` >= 0 over the steps of one person."""
    b, k, n = participation.min_sep, participation.max_participations, gains.size
    if isinstance(participation, FixedCycle):
        return float(np.pad(gains, (0, k * b - n)).reshape(k, b).sum(0).max())
    envelope = np.maximum.accumulate(gains[::-1])[::-1]
    early = float(envelope[: k * b : b].sum())
    if early <= gains[: k * b : b].sum() * (1 + ROUNDING):
        return early  # the gains shrink, up to rounding: as early as allowed is best
    best = np.zeros(n + b)  # best[i]: from step i on with j participations left (VecSens)
    for _ in range(k):
        best[:n] = np.maximum.accumulate((gains + best[b:])[::-1])[::-1]
    return float(best[0])


def _toeplitz(
    strategy: CausalMatrix, c: Array, participation: FixedCycle | MinSeparation
) -> Sensitivity:
    """Toeplitz strategies whose columns overlap (bands > separation)."""
    n, b, k = strategy.n_steps, participation.min_sep, participation.max_participations
    first = _first_pattern(c, n, b, k)
    if c.min() >= 0:
        if np.all(c[1:] <= c[:-1]):
            return Sensitivity(first, True, "non-increasing coefficients (Theorem 2)")
        if np.all(c[1:] >= c[:-1]):
            # X_st is the sum of c_j c_{j-(t-s)} over t - s <= j < min(p, n - s): its terms, and
            # their number, shrink as t - s or s grows.
            return Sensitivity(first, True, "non-decreasing coefficients")
        if isinstance(participation, FixedCycle):
            # A later start only cuts the same sum off earlier.
            return Sensitivity(first, True, "first cycle of non-negative coefficients")
    magnitudes = np.abs(c)
    pairwise = np.inf
    if isinstance(participation, MinSeparation) and k * n <= PAIRWISE_WORK:
        pairwise = _pairwise(magnitudes, n, b, k)
        if pairwise <= first * (1 + ROUNDING):  # the first pattern reaches what no other exceeds
            return Sensitivity(first, True, "every pair of steps is worst when earliest")
    found = _worst(strategy, participation)
    if found is not None:
        return found
    if isinstance(participation, FixedCycle):
        return Sensitivity(_first_pattern(magnitudes, n, b, k), False, "absolute coefficients")
    envelope = _first_pattern(np.maximum.accumulate(magnitudes[::-1])[::-1], n, b, k)
    if pairwise < envelope:
        return Sensitivity(pairwise, False, "worst pair of steps")
    return Sensitivity(envelope, False, "non-increasing envelope")


def _worst(strategy: CausalMatrix, participation: FixedCycle | MinSeparation) -> Sensitivity | None:
    """Find the worst pattern itself, where that is affordable."""
    b, k = participation.min_sep, participation.max_participations
    if isinstance(participation, FixedCycle):
        found, method = worst_cycle(strategy, b), "every cycle of the Gram matrix"
    else:
        found, method = worst_pattern(strategy, b, k), "dynamic programming over the Gram matrix"
    return None if found is None else Sensitivity(_root(found[0]), found[1], method)


def _first_pattern(c: Array, n: int, b: int, k: int) -> float:
    """Return the norm of sum_{j<k} C[:, jb], in O(n)."""
    return float(np.linalg.norm(comb(c, n, b, k)[:n]))


def _pairwise(magnitudes: Array, n: int, b: int, k: int) -> float:
    """Bound sens by taking the worst distance for each pair of ranks r < r + g on its own.

    The pair's steps satisfy s >= rb and t - s >= gb, and |X_st| is at most the auto-correlation at
    lag t - s of the first n - s magnitudes, which shrinks as s grows.
    """
    total = 0.0
    for r in range(k):
        c = magnitudes[: n - r * b]
        lags = correlate(c, c, method="auto")[c.size - 1 :]
        worst = np.maximum.accumulate(lags[::-1])[::-1]
        total += lags[0] + 2 * worst[b : (k - r - 1) * b + 1 : b].sum()
    return _root(total)


def _gram(c: Array, participation: FixedCycle | MinSeparation) -> Sensitivity:
    """Any strategy, from its Gram matrix: O(n^2) memory."""
    x = c.T @ c
    if isinstance(participation, FixedCycle):
        b, n = participation.period, c.shape[0]
        patterns = [np.arange(i, n, b) for i in range(min(b, n))]
        signed = max(float(x[np.ix_(p, p)].sum()) for p in patterns)
        bound = max(float(np.abs(x[np.ix_(p, p)]).sum()) for p in patterns)
        return Sensitivity(_root(bound), signed >= bound, "every cycle of the Gram matrix")
    rows = np.array([_best_pattern(row, participation) for row in np.abs(x)])
    return Sensitivity(_root(_best_pattern(rows, participation)), False, "rows of the Gram matrix")


def _tree(strategy: Tree, participation: FixedCycle | MinSeparation) -> Sensitivity:
    """Binary trees: no estimator releases more than all block sums, and "full" just those."""
    n, b, k = strategy.n_steps, participation.min_sep, participation.max_participations
    method, whole = "blocks of the tree", strategy.estimator == "full"
    cycles = cycle_squares(n, b)
    if isinstance(participation, FixedCycle):
        return Sensitivity(_root(cycles.max()), whole, method)
    bound = most_squares(n, b, k)
    reached = bool(cycles[0] == bound)
    return Sensitivity(_root(bound), whole and k * b >= n and reached, method)


def _root(square: float) -> float:
    return float(np.sqrt(square))
