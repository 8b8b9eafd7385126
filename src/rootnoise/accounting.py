"""(epsilon, delta) <-> noise multiplier; the only file that imports dp_accounting.

Without amplification the whole run is ONE Gaussian mechanism of sensitivity 1 and standard
deviation `noise_multiplier`, whatever the strategy (Denisov et al. 2022: adaptivity costs nothing
when C is lower-triangular). Its epsilon is exact. Under cyclic Poisson sampling it is that many
subsampled Gaussian mechanisms composed; their privacy loss distribution on a grid gives an upper
bound.
Every number is rounded to the private side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from dp_accounting import get_epsilon_gaussian, get_sigma_gaussian
from dp_accounting.pld import privacy_loss_distribution

from rootnoise._check import RootnoiseError, real
from rootnoise.participation import CyclicPoisson, Participation

# dp_accounting solves the exact formula to 1e-12 absolute; one part in 1e10 more keeps us above it.
SAFETY = 1 + 1e-10
# The grid is refined until four times finer changes epsilon by less; the error falls as its square.
GRID_TOLERANCE = 1e-3
COARSEST_GRID, FINEST_GRID = 1e-2, 1e-2 / 4**6
# A calibration takes 3 to 8 of these steps on a grid.
SECANTS = 30


@dataclass(frozen=True)
class PrivacyCost:
    """The privacy of a whole run at one delta.

    Attributes:
        epsilon: the privacy loss.
        delta: its failure probability.
        exact: False where epsilon is an upper bound.
        method: how it was computed.
    """

    epsilon: float
    delta: float
    exact: bool
    method: str


def privacy_cost(
    participation: Participation, n_steps: int, noise_multiplier: float, delta: float
) -> PrivacyCost:
    """Return the epsilon that `noise_multiplier` buys at `delta`, one person added or removed.

    Unamplified: Balle & Wang (2018), Theorem 8, exact. Cyclic Poisson: ceil(n / groups)
    compositions of the Poisson-subsampled Gaussian (Choquette-Choo et al. 2023, Theorem 4; one
    group is DP-SGD) by privacy loss distributions, an upper bound within 0.1 % of the exact
    composition.

    Raises:
        RootnoiseError: an argument out of range, or n_steps that the participation refuses.

    >>> from rootnoise.participation import SingleParticipation
    >>> round(privacy_cost(SingleParticipation(), 100, 3.7306316348, 1e-5).epsilon, 6)
    1.0
    """
    sigma = real("noise_multiplier", noise_multiplier, above=0)
    real("delta", delta, above=0, below=1)
    participation.validate(n_steps)
    if not isinstance(participation, CyclicPoisson):
        epsilon = get_epsilon_gaussian(sigma, delta) * SAFETY
        return PrivacyCost(float(epsilon), delta, True, "analytic Gaussian")
    rounds = participation.rounds(n_steps)
    epsilon, _ = _refined(sigma, participation.probability, rounds, delta)
    return PrivacyCost(epsilon, delta, False, f"PLD of {rounds} Poisson-subsampled Gaussians")


def noise_multiplier(
    participation: Participation,
    n_steps: int,
    epsilon: float,
    delta: float,
    tolerance: float = GRID_TOLERANCE,
) -> float:
    """Return the least noise multiplier found that costs at most `epsilon` at `delta`.

    Args:
        participation: who may take part when.
        n_steps: steps n.
        epsilon: the privacy loss to spend.
        delta: its failure probability.
        tolerance: part of epsilon that the grid of a privacy loss distribution may waste; a larger
            one is faster, and its noise multiplier larger, never too small.

    Raises:
        RootnoiseError: an argument out of range, or n_steps that the participation refuses.

    >>> from rootnoise.participation import SingleParticipation
    >>> round(noise_multiplier(SingleParticipation(), 100, epsilon=8, delta=1e-5), 6)
    0.600229
    """
    target = real("epsilon", epsilon, above=0)
    real("delta", delta, above=0, below=1)
    tolerance = real("tolerance", tolerance, at_least=GRID_TOLERANCE, below=1)
    participation.validate(n_steps)
    sigma = float(get_sigma_gaussian(target, delta)) * SAFETY
    if isinstance(participation, CyclicPoisson):
        rounds = participation.rounds(n_steps)
        return _poisson_sigma(sigma, participation.probability, rounds, target, delta, tolerance)
    while privacy_cost(participation, n_steps, sigma, delta).epsilon > target:
        sigma *= SAFETY
    return sigma


def _poisson_sigma(
    alone: float, q: float, rounds: int, target: float, delta: float, tolerance: float
) -> float:
    """Return the noise multiplier of so many rounds; `alone` is that of one without sampling.

    The search starts where the central limit has it (Bu, Dong, Long & Su 2020), on a coarse grid,
    and goes on to finer ones, each about 4 times slower, as `_refined` does.
    """
    if q * rounds <= delta:  # no noise would do: whoever is drawn at all falls under delta
        raise RootnoiseError(
            f"delta must be below the chance to be drawn, at most {q * rounds:g}, got {delta:g}"
        )
    sigma, power = math.log1p(1 / (alone * q) ** 2 / rounds) ** -0.5, 1.0
    grid = COARSEST_GRID
    while grid > max(FINEST_GRID, target / 400):
        grid /= 4

    def ratio_at(sigma: float) -> float:
        return _poisson_epsilon(sigma, q, rounds, delta, grid) / target

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
    epsilon = _poisson_epsilon(sigma, q, rounds, delta, grid)
    if not math.isfinite(epsilon):  # more mass than delta was cut off the tails, on any grid
        raise RootnoiseError(
            f"noise_multiplier must give a finite epsilon at delta={delta:g}, got {sigma:g}"
        )
    while grid > FINEST_GRID:
        grid /= 4
        coarse, epsilon = epsilon, _poisson_epsilon(sigma, q, rounds, delta, grid)
        if coarse - epsilon <= tolerance * epsilon:
            break
    return epsilon, grid


def _poisson_epsilon(sigma: float, q: float, rounds: int, delta: float, grid: float) -> float:
    # Pessimistic, "connect the dots" (Doroshenko et al. 2022): never below the exact composition.
    loss = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=q, value_discretization_interval=grid
    )
    return float(loss.self_compose(rounds).get_epsilon_for_delta(delta))
