"""The Gaussian mechanism, exactly, and Poisson-subsampled ones by privacy loss distributions.

The only file that imports dp_accounting. Every number is rounded to the private side.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from dp_accounting import get_epsilon_gaussian, get_sigma_gaussian
from dp_accounting.pld import privacy_loss_distribution

from rootnoise._check import RootnoiseError
from rootnoise.accounting.cost import Progress

# dp_accounting solves the exact formula to 1e-12 absolute; one part in 1e10 more keeps us above it.
SAFETY = 1 + 1e-10
# The grid is refined until four times finer changes epsilon by less; the error falls as its square.
GRID_TOLERANCE = 1e-3
COARSEST_GRID, FINEST_GRID = 1e-2, 1e-2 / 4**6
# A calibration takes 3 to 8 of these steps on a grid.
SECANTS = 30


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Return epsilon of N(1, sigma^2) against N(0, sigma^2) (Balle & Wang 2018, Theorem 8)."""
    return float(get_epsilon_gaussian(sigma, delta)) * SAFETY


def gaussian_multiplier(epsilon: float, delta: float) -> float:
    """Return the least sigma found whose `gaussian_epsilon` is at most `epsilon`."""
    sigma = float(get_sigma_gaussian(epsilon, delta)) * SAFETY
    while gaussian_epsilon(sigma, delta) > epsilon:
        sigma *= SAFETY
    return sigma


def poisson_epsilon(sigma: float, q: float, rounds: int, delta: float) -> float:
    """Return an upper bound within 0.1 % on epsilon of `rounds` subsampled Gaussians, composed.

    Raises:
        RootnoiseError: no finite epsilon can be stated at this delta.
    """
    return _refined(sigma, q, rounds, delta)[0]


def poisson_multiplier(
    target: float,
    q: float,
    rounds: int,
    delta: float,
    tolerance: float = GRID_TOLERANCE,
    progress: Progress | None = None,
) -> float:
    """Return the least sigma found whose `poisson_epsilon` is at most `target`.

    The search starts where the central limit has it (Bu, Dong, Long & Su 2020), on a coarse grid,
    and goes on to finer ones, each about 4 times slower, as `_refined` does.

    Raises:
        RootnoiseError: nobody need be hidden, as being drawn at all is less likely than delta.
    """
    if q * rounds <= delta:  # no noise would do: whoever is drawn at all falls under delta
        raise RootnoiseError(
            f"delta must be below the chance to be drawn, at most {q * rounds:g}, got {delta:g}"
        )
    alone = gaussian_multiplier(target, delta)
    sigma, power = math.log1p(1 / (alone * q) ** 2 / rounds) ** -0.5, 1.0
    grid = COARSEST_GRID
    while grid > max(FINEST_GRID, target / 400):
        grid /= 4

    def ratio_at(sigma: float) -> float:
        found = _on_grid(sigma, q, rounds, delta, grid)
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
    return float(sigma)


def _solved(ratio_at: Callable[[float], float], sigma: float, power: float) -> tuple[float, float]:
    """Return sigma with ratio_at(sigma) = 1, and the power -p of sigma that the ratio falls as."""
    before = None
    for _ in range(SECANTS):
        ratio = min(ratio_at(sigma), 4.0)  # it is infinite where sigma is far too small
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
    grid = COARSEST_GRID
    epsilon = _on_grid(sigma, q, rounds, delta, grid)
    if not math.isfinite(epsilon):  # more mass than delta was cut off the tails, on any grid
        raise RootnoiseError(
            f"noise_multiplier must give a finite epsilon at delta={delta:g}, got {sigma:g}"
        )
    while grid > FINEST_GRID:
        grid /= 4
        coarse, epsilon = epsilon, _on_grid(sigma, q, rounds, delta, grid)
        if coarse - epsilon <= tolerance * epsilon:
            break
    return epsilon, grid


def _on_grid(sigma: float, q: float, rounds: int, delta: float, grid: float) -> float:
    # Pessimistic, "connect the dots" (Doroshenko et al. 2022): never below the exact composition.
    loss = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=q, value_discretization_interval=grid
    )
    return float(loss.self_compose(rounds).get_epsilon_for_delta(delta))
