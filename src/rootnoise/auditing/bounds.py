"""What the answers of an attack prove: lower bounds on epsilon, each at a stated confidence."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import stats

from rootnoise._check import integer, real

# Bisections end within this of the answer, on the side that claims less.
PRECISION = 1e-4
# No attack on so few people can show more.
LARGEST = 100.0


def clopper_pearson(hits: int, trials: int, failure: float) -> float:
    """Return an upper bound on a probability that gave `hits` of `trials`, wrong with `failure`.

    Clopper & Pearson (1934).

    Raises:
        RootnoiseError: a value out of range.

    >>> round(clopper_pearson(0, 100, 0.05), 6)
    0.029513
    """
    n = integer("trials", trials, 1)
    k = integer("hits", hits, 0, n, high_name="trials")
    real("failure", failure, above=0, below=1)
    return 1.0 if k == n else float(stats.beta.ppf(1 - failure, k + 1, n - k))


def one_run_p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Return how probable so many right guesses are, at most, if one run is (epsilon, delta)-DP.

    Steinke, Nasr & Jagielski (2023, "Privacy auditing with one (1) training run"), Theorem 5.2:
    each of m canaries is in the run by its own fair coin; of r guesses v or more are right with
    probability at most beta + 2 m delta alpha, beta = P[B >= v],
    alpha = max over i of P[v > B >= v - i] / i, B binomial(r, e^eps / (1 + e^eps)).

    Args:
        canaries: m.
        guesses: r, the canaries that were guessed to be in or out; the others were passed over.
        right: v.
        epsilon: the null hypothesis.
        delta: likewise.

    Raises:
        RootnoiseError: more guesses than canaries, more right ones than guesses, or values out of
            range.

    >>> one_run_p_value(canaries=10, guesses=10, right=10, epsilon=0.0, delta=0.0) == 2**-10
    True
    """
    m = integer("canaries", canaries, 1)
    r = integer("guesses", guesses, 0, m, high_name="canaries")
    v = integer("right", right, 0, r, high_name="guesses")
    real("epsilon", epsilon, at_least=0)
    real("delta", delta, at_least=0, below=1)
    q = 1 / (1 + math.exp(-epsilon))
    beta = float(stats.binom.sf(v - 1, r, q))
    if v == 0:
        return 1.0
    within = np.cumsum(stats.binom.pmf(np.arange(v - 1, -1, -1), r, q))
    alpha = float((within / np.arange(1, v + 1)).max())
    return min(1.0, beta + 2 * m * delta * alpha)


def one_run_epsilon(canaries: int, guesses: int, right: int, delta: float, failure: float) -> float:
    """Return the epsilon that one run exceeds, wrong with probability `failure`.

    Raises:
        RootnoiseError: as `one_run_p_value`, or a `failure` out of (0, 1).

    >>> one_run_epsilon(canaries=1000, guesses=100, right=98, delta=1e-5, failure=0.05)
    2.7...
    """
    real("failure", failure, above=0, below=1)
    return _largest(
        lambda e: one_run_p_value(canaries, guesses, right, e, delta) <= failure, LARGEST
    )


def classic_epsilon(false_in: float, false_out: float, delta: float) -> float:
    """Return the least epsilon that allows a test with these error probabilities.

    Kairouz, Oh & Viswanath (2015): 1 - FN <= e^eps FP + delta, and with both exchanged.

    >>> round(classic_epsilon(false_in=0.01, false_out=0.5, delta=0.0), 4)
    3.912
    """
    found = 0.0
    for a, b in ((false_in, false_out), (false_out, false_in)):
        if 1 - b - delta > 0:
            found = max(found, math.log((1 - b - delta) / a) if a > 0 else LARGEST)
    return min(found, LARGEST)


def gaussian_mu(false_in: float, false_out: float) -> float:
    """Return the least mu for which a mu-GDP mechanism allows these error probabilities.

    Dong, Roth & Su (2022): Phi^-1(1 - FP) - Phi^-1(FN). For a mechanism whose trade-off is that of
    two Gaussians, as is every run without sampling; Nasr et al. (2023) audit with it.

    >>> round(gaussian_mu(0.1587, 0.1587), 3)
    2.0
    """
    return max(0.0, float(stats.norm.isf(false_in) - stats.norm.ppf(false_out)))


def _largest(refuted: Callable[[float], bool], high: float) -> float:
    """Return the largest value that is refuted, from 0 on; refutations end somewhere below."""
    low = 0.0
    if not refuted(low):
        return 0.0
    while high - low > PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
