"""The epsilon of the best of a random number of trials, by a second route.

The same theorems as `accounting.selection` (docs: Tuning) with other numerics: the distribution of
the number of trials is SciPy's, suprema and infima are searched for rather than bounded, and the
epsilon of one trial comes from the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import optimize, stats

from rootnoise.accounting import Trials

# The claim's own tolerances: on a ratio, and of 600 orders beside the best one.
RATIO, SMALL, ORDERS = 3e-7, 6.0, 1e-3


def best_of(
    trials: Trials, mu: float, delta: float, alone: Callable[[float, float], float]
) -> tuple[float, float]:
    """Return the bound that the theorem gives, and the most that a claim of it may be.

    Args:
        trials: how many.
        mu: a trial is mu-Gaussian differentially private.
        delta: of the release.
        alone: the epsilon of one trial, for mu and a delta.

    >>> from rootnoise.accounting.gaussian import gaussian_epsilon
    >>> low, high = best_of(Trials(10), 0.5, 1e-5, lambda m, d: gaussian_epsilon(1 / m, d))
    >>> round(low, 3), round(high, 3)
    (3.146, 3.2)
    """
    single = alone(mu, delta)
    if trials.shape == math.inf:
        least = _poisson(trials.mean, mu, delta)
        return max(least, single), max(least * (1 + ORDERS), single)
    gamma, eta = _gamma(trials), trials.shape
    ratio = _ratio(gamma / (1 - gamma), mu)
    most = ratio * (1 + SMALL * min(mu, 0.01)) + RATIO
    base = alone(mu, delta / trials.mean)
    return max(base + (1 + eta) * ratio, single), max(base + (1 + eta) * most, single)


def _gamma(trials: Trials) -> float:
    """Return the parameter at which SciPy's distribution has the mean; of K given K >= 1."""

    def mean(gamma: float) -> float:
        if trials.shape == 0:
            return float(stats.logser.mean(1 - gamma))
        number = stats.nbinom(trials.shape, gamma)
        return float(number.mean() / number.sf(0))

    log = optimize.brentq(lambda x: math.log(mean(math.exp(x)) / trials.mean), -25, -1e-7)
    return math.exp(float(log))


def _ratio(offset: float, mu: float) -> float:
    """Return the largest log((c + Phi(z + mu)) / (c + Phi(z))), searched for."""

    def negative(z: float) -> float:
        above, below = stats.norm.cdf(z + mu), stats.norm.cdf(z)
        return -float(np.log1p((above - below) / (offset + below)))

    places = np.linspace(-20 - mu, 10, 2001)
    best = places[int(np.argmin([negative(z) for z in places]))]
    gap = places[1] - places[0]
    found = optimize.minimize_scalar(
        negative, bounds=(best - gap, best + gap), method="bounded", options={"xatol": 1e-9}
    )
    return -float(found.fun)


def _poisson(mean: float, mu: float, delta: float) -> float:
    """Return the least epsilon over all orders of Papernot and Steinke (2022), Theorem 6."""

    def epsilon(log_above: float) -> float:
        above = math.exp(log_above)  # the order a, minus 1
        near = math.log1p(1 / above)
        out = stats.norm.logcdf(mu / 2 - near / mu)
        lost = math.exp(out) * -math.expm1(near + stats.norm.logcdf(-mu / 2 - near / mu) - out)
        renyi = (1 + above) * mu**2 / 2 + mean * lost + math.log(mean) / above
        return renyi - near - math.log(delta * (1 + above)) / above

    starts = np.linspace(math.log(1e-3), math.log(1e5), 200)
    best = starts[int(np.argmin([epsilon(x) for x in starts]))]
    gap = starts[1] - starts[0]
    found = optimize.minimize_scalar(epsilon, bounds=(best - gap, best + gap), method="bounded")
    return max(0.0, float(found.fun))
