"""Upper confidence bounds on the mean of bounded samples; none assumes a distribution."""

from __future__ import annotations

import math

from scipy.optimize import brentq


def upper(mean: float, square: float, size: int, largest: float, failure: float) -> float:
    """Bound the expectation of samples in [0, largest], with probability at least 1 - `failure`.

    The lesser of Maurer & Pontil (2009, "Empirical Bernstein bounds", Theorem 4), with the mean of
    the squares for the variance, and Hoeffding (1963, Theorem 1) in its relative-entropy form; each
    has half of `failure`. Both grow with `mean`, `square` and `largest`, so that where the samples
    shrink as epsilon grows, the bound does too.

    Args:
        mean: mean of the samples.
        square: mean of their squares.
        size: how many there are.
        largest: no sample can exceed it.
        failure: probability, at most, that the bound is too small.
    """
    return min(
        _bernstein(mean, square, size, largest, failure / 2),
        largest * _hoeffding(min(1.0, mean / largest), size, failure / 2) if largest else 0.0,
    )


def _bernstein(mean: float, square: float, size: int, largest: float, failure: float) -> float:
    log = math.log(2 / failure)
    # The variance is at most square * size / (size - 1).
    return mean + math.sqrt(2 * square * log / (size - 1)) + 7 * largest * log / (3 * (size - 1))


def _hoeffding(mean: float, size: int, failure: float) -> float:
    """Return the largest m with size * KL(mean | m) <= log(1 / failure), for samples in [0, 1]."""
    level = -math.log(failure) / size
    if mean >= 1 or _entropy(mean, 1 - 1e-15) <= level:
        return 1.0
    root = brentq(lambda m: _entropy(mean, m) - level, mean, 1 - 1e-15, xtol=1e-300, rtol=1e-12)
    return float(root) * (1 + 1e-11)


def _entropy(p: float, q: float) -> float:
    if q <= p:
        return 0.0
    first = p * math.log(p / q) if p > 0 else 0.0
    return first + (1 - p) * (math.log1p(-p) - math.log1p(-q))
