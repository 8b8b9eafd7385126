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
from dataclasses import dataclass

from dp_accounting import get_epsilon_gaussian, get_sigma_gaussian
from dp_accounting.pld import privacy_loss_distribution
from scipy.optimize import brentq

from rootnoise._check import RootnoiseError, real
from rootnoise.participation import CyclicPoisson, Participation

# dp_accounting solves the exact formula to 1e-12 absolute; one part in 1e10 more keeps us above it.
SAFETY = 1 + 1e-10
# The grid is refined until four times finer changes epsilon by less; the error falls as its square.
GRID_TOLERANCE = 1e-3
COARSEST_GRID, FINEST_GRID = 1e-2, 1e-2 / 4**6


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
    participation: Participation, n_steps: int, epsilon: float, delta: float
) -> float:
    """Return the least noise multiplier found that costs at most `epsilon` at `delta`.

    Raises:
        RootnoiseError: an argument out of range, or n_steps that the participation refuses.

    >>> from rootnoise.participation import SingleParticipation
    >>> round(noise_multiplier(SingleParticipation(), 100, epsilon=8, delta=1e-5), 6)
    0.600229
    """
    target = real("epsilon", epsilon, above=0)
    real("delta", delta, above=0, below=1)
    participation.validate(n_steps)
    # Sampling can only help, so the unamplified answer for all rounds is enough noise for any q.
    sigma = float(get_sigma_gaussian(target, delta)) * SAFETY
    if not isinstance(participation, CyclicPoisson):
        while privacy_cost(participation, n_steps, sigma, delta).epsilon > target:
            sigma *= SAFETY
        return sigma
    q, rounds = participation.probability, participation.rounds(n_steps)
    enough = sigma * math.sqrt(rounds) * 1.001  # the grid's slack
    while _refined(enough, q, rounds, delta)[0] > target:
        enough *= 1.1
    too_little = enough / 2
    while _refined(too_little, q, rounds, delta)[0] <= target:
        enough, too_little = too_little, too_little / 2
    # Locate on the grid that is fine enough there, then step to the private side of the root.
    grid = _refined(too_little, q, rounds, delta)[1] / 4
    sigma = brentq(
        lambda s: _poisson_epsilon(s, q, rounds, delta, grid) - target,
        too_little,
        enough,
        xtol=1e-6 * enough,
    )
    while _refined(sigma, q, rounds, delta)[0] > target:
        sigma *= 1 + 1e-5
    return float(sigma)


def _refined(sigma: float, q: float, rounds: int, delta: float) -> tuple[float, float]:
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
        if coarse - epsilon <= GRID_TOLERANCE * epsilon:
            break
    return epsilon, grid


def _poisson_epsilon(sigma: float, q: float, rounds: int, delta: float, grid: float) -> float:
    # Pessimistic, "connect the dots" (Doroshenko et al. 2022): never below the exact composition.
    loss = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=q, value_discretization_interval=grid
    )
    return float(loss.self_compose(rounds).get_epsilon_for_delta(delta))
