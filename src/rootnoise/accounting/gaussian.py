"""The Gaussian mechanism, exactly, and Poisson-subsampled ones by privacy loss distributions.

Every number is rounded to the private side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from scipy.special import erfcx, ndtr

from rootnoise._check import Array, RootnoiseError
from rootnoise.accounting import subsampled
from rootnoise.accounting.composition import UNIT
from rootnoise.accounting.cost import Progress

# The formula of delta is right to 1e-12 (against 60 digits); log delta is undercut by so much.
MARGIN = 1e-11
NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)
ROOT = math.sqrt(2 * math.pi)
# Single-step losses beyond this span are not put on a grid: amplification is not claimed there.
WIDEST = 500.0
# Points of one step's grid: 0.3 GB, and 1 s.
MOST_POINTS = 2**19
# The grid is refined until four times finer changes epsilon by less; the error falls as its square.
GRID_TOLERANCE = 1e-3
COARSEST_GRID, FINEST_GRID = 1e-2, 1e-2 / 4**6
# A calibration takes 3 to 8 of these steps on a grid.
SECANTS = 30
# Log of the part of delta that tails cut off a step may cost, over all rounds.
CUT = -12.0


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Return epsilon of N(1, sigma^2) against N(0, sigma^2) (Balle & Wang 2018, Theorem 8).

    Never below the true one, by `MARGIN` of delta.

    Raises:
        RootnoiseError: epsilon is beyond the numbers of a float.
    """
    mu, goal = 1 / sigma, math.log(delta) - MARGIN
    if not math.isfinite(mu * mu) or mu == 0:
        raise RootnoiseError(f"noise_multiplier must be in (1e-154, 1e308), got {sigma:g}")
    if _log_delta(-mu / 2, mu) <= goal:
        return 0.0
    # epsilon = mu t for a = t - mu / 2; at a = 40 no delta of a float is left.
    _, t = _turn(lambda t: _log_delta(t - mu / 2, mu) <= goal, 40 + mu / 2)
    return mu * t * (1 + 4 * UNIT)


def gaussian_delta(sigma: float, epsilon: float) -> float:
    """Return delta of N(1, sigma^2) against N(0, sigma^2) at `epsilon`, by the same theorem.

    Never below the true one, by `MARGIN` of delta.
    """
    mu = 1 / sigma
    return min(1.0, math.exp(_log_delta(epsilon / mu - mu / 2, mu) + MARGIN))


def gaussian_multiplier(epsilon: float, delta: float) -> float:
    """Return the least sigma found whose `gaussian_epsilon` is at most `epsilon`.

    Raises:
        RootnoiseError: it is beyond the numbers of a float.
    """
    goal, root = math.log(delta) - MARGIN, math.sqrt(2) * math.sqrt(epsilon)

    def mu_at(a: float) -> float:
        """Return the mu > 0 of epsilon = mu (a + mu / 2)."""
        b = math.hypot(a, root)
        return root * (root / (a + b)) if a > 0 else b - a

    def enough(a: float) -> bool:
        return _log_delta(a, mu_at(a)) <= goal

    if not enough(0.0):
        _, a = _turn(enough, 40.0)
    elif enough(-40.0):
        a = -40.0
    else:
        least, _ = _turn(lambda c: not enough(-c), 40.0)
        a = -least if enough(-least) else 0.0
    sigma = 1 / mu_at(a) if mu_at(a) > 0 else math.inf
    if not 1e-150 < sigma < 1e300:
        raise RootnoiseError(
            f"epsilon must have a noise multiplier in (1e-150, 1e300), got {epsilon:g}"
        )
    sigma *= 1 + 1e-13
    step = 1e-12
    while gaussian_epsilon(sigma, delta) > epsilon:
        sigma *= 1 + step
        step *= 2
    return sigma


def _log_delta(a: float, mu: float) -> float:
    """Return log delta at epsilon = mu (a + mu / 2), to 1e-12.

    delta = Phi(-a) - e^epsilon Phi(-b) = phi(a) (R(a) - R(b)), with b = a + mu and Mills' ratio
    R = Phi(-x) / phi(x); where a and b are close the difference is integrated, R' = x R - 1.
    """
    b = a + mu
    if mu < 0.1:
        x = a + mu * (NODES + 1) / 2
        difference = mu / 2 * float(WEIGHTS @ (1 - x * _mills(x)))
    elif a < -5:
        gap = float(np.exp(-a * a / 2) / ROOT * _mills(b)) if b > -5 else None
        if gap is None:  # both far below: phi(a) R(b) = e^epsilon Phi(-b)
            gap = math.exp(min(0.0, mu * (a + mu / 2))) * float(ndtr(-b))
        return math.log(max(float(ndtr(-a)) - gap, 5e-324))
    else:
        difference = float(_mills(a) - _mills(b))
    if difference <= 0:
        return -math.inf
    return -a * a / 2 - math.log(ROOT) + math.log(difference)


def _mills(x: float | Array) -> Array:
    value: Array = math.sqrt(math.pi / 2) * erfcx(np.asarray(x) / math.sqrt(2))
    return value


def _turn(far: Callable[[float], bool], high: float) -> tuple[float, float]:
    """Return x > 0 where `far` does not hold and the next where it does, to the last digits.

    `far` is taken to hold at `high` and beyond; if it holds everywhere, both are about 1e-307.
    """
    low = high
    while low > 1e-307 and far(low / 2):
        low /= 2
    low, high = low / 2, low
    while high - low > 2 * UNIT * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (low, middle) if far(middle) else (middle, high)
    return low, high


def poisson_epsilon(sigma: float, q: float, rounds: int, delta: float) -> float:
    """Return an upper bound on epsilon of `rounds` subsampled Gaussians, composed."""
    return _refined(sigma, q, rounds, delta)[0]


def poisson_cost(sigma: float, q: float, rounds: int, delta: float) -> tuple[float, bool]:
    """Return the bound, and whether the sampling makes it smaller.

    It does not for q = 1, nor where `_refined` puts no losses on a grid or no grid is fine enough:
    below an epsilon of about `FINEST_GRID`.
    """
    epsilon = poisson_epsilon(sigma, q, rounds, delta)
    return epsilon, epsilon < _certain(sigma, rounds, delta)


def poisson_multiplier(
    target: float,
    q: float,
    rounds: int,
    delta: float,
    tolerance: float = GRID_TOLERANCE,
    progress: Progress | None = None,
) -> float:
    """Return the least sigma found whose `poisson_epsilon` is at most `target`.

    Targets below `FINEST_GRID` get the noise that suffices without amplification.

    The search starts at the central limit theorem's sigma (Bu, Dong, Long & Su 2020), on a coarse
    grid, and goes on to finer ones, each about 4 times slower, as `_refined` does.

    Raises:
        RootnoiseError: being drawn at all is less likely than delta: no noise is needed.
    """
    if q * rounds <= delta:  # delta covers every person who is drawn at all
        raise RootnoiseError(
            f"delta must be below the chance to be drawn, at most {q * rounds:g}, got {delta:g}"
        )
    alone = gaussian_multiplier(target, delta)
    enough = alone * math.sqrt(rounds) * (1 + 1e-12)
    while _certain(enough, rounds, delta) > target:
        enough *= 1 + 1e-12
    if q == 1 or _span(enough, q) > WIDEST or target < FINEST_GRID:
        return enough
    sigma, power = math.log1p(1 / (alone * q) ** 2 / rounds) ** -0.5, 1.0
    grid = COARSEST_GRID
    while grid > max(FINEST_GRID, target / 400):
        grid /= 4

    def ratio_at(sigma: float) -> float:
        # A secant may jump to a sigma whose losses would take all memory.
        wide = _span(sigma, q) > WIDEST
        found = math.inf if wide else _on_grid(sigma, q, rounds, delta, grid)
        if progress is not None:
            progress(sigma, found)
        return found / target

    while True:
        sigma, power = _solved(ratio_at, sigma, power)
        grid /= 4
        if grid < FINEST_GRID or ratio_at(sigma) >= 1 - tolerance:
            break
    while (ratio := _refined(sigma, q, rounds, delta, tolerance)[0] / target) > 1:
        sigma *= ratio ** (1 / power) * (1 + 1e-6)
    return min(float(sigma), enough)


def _solved(ratio_at: Callable[[float], float], sigma: float, power: float) -> tuple[float, float]:
    """Return sigma with ratio_at(sigma) = 1, and p where the ratio falls as sigma^-p."""
    before = None
    for _ in range(SECANTS):
        ratio = min(max(ratio_at(sigma), 0.25), 4.0)  # infinite where sigma is far too small
        if abs(ratio - 1) < 1e-6:
            break
        if before is not None and ratio != before[1]:
            power = math.log(before[1] / ratio) / math.log(sigma / before[0])
            power = min(max(power, 0.2), 5.0)
        before = sigma, ratio
        sigma *= ratio ** (1 / power)
    return sigma, power


def _refined(
    sigma: float, q: float, rounds: int, delta: float, tolerance: float = GRID_TOLERANCE
) -> tuple[float, float]:
    """Return an upper bound on epsilon and the grid that suffices for it."""
    certain = _certain(sigma, rounds, delta)
    grid = COARSEST_GRID
    if q == 1 or _span(sigma, q) > WIDEST:
        return certain, grid
    best = _on_grid(sigma, q, rounds, delta, grid)
    while grid > FINEST_GRID and 4 * _span(sigma, q) / grid <= MOST_POINTS:
        grid /= 4
        coarse, found = best, _on_grid(sigma, q, rounds, delta, grid)
        best = min(coarse, found)
        if coarse - found <= tolerance * found:
            break
    return float(min(best, certain)), grid


def _certain(sigma: float, rounds: int, delta: float) -> float:
    """Return epsilon without amplification: `rounds` Gaussians are one of sigma / sqrt(rounds)."""
    return gaussian_epsilon(sigma / math.sqrt(rounds) * (1 - 4 * UNIT), delta)


def _span(sigma: float, q: float) -> float:
    """Return about the range of one step's losses, with both tails cut at e^-50."""
    most, none = 0.5 / sigma**2 + 10.5 / sigma, math.log1p(-min(q, 0.999))
    return float(np.logaddexp(none, math.log(q) + most)) - none


# A calibration confirms on the grids it used, and whoever makes the mechanism asks again.
@lru_cache(maxsize=256)
def _on_grid(sigma: float, q: float, rounds: int, delta: float, grid: float) -> float:
    cut = math.log(delta / rounds) + CUT
    steps = (subsampled.losses(sigma, q, grid, cut, add=add) for add in (False, True))
    return float(max(step.epsilon(rounds, delta) for step in steps))  # both directions count
