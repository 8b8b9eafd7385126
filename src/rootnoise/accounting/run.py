"""(epsilon, delta) <-> noise multiplier, for a whole run.

Without amplification the run is ONE Gaussian mechanism of sensitivity 1 and standard deviation
`noise_multiplier`, whatever the strategy (Denisov et al. 2022: adaptivity costs nothing when C is
lower-triangular). Its epsilon is exact. Where a person's steps are drawn at random, the accountant
composes subsampled Gaussians, or samples the likelihood ratio of a Gaussian mixture. The page
Accounting of the documentation says which theorem stands behind each number. Every number is
rounded to the private side.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from rootnoise._check import RootnoiseError, integer, real
from rootnoise.accounting import bin_bounds, gaussian
from rootnoise.accounting import monte_carlo as estimate
from rootnoise.accounting.balls_in_bins import Bins, bin_gram
from rootnoise.accounting.cost import MonteCarlo, PrivacyCost, Progress
from rootnoise.accounting.gaussian import GRID_TOLERANCE
from rootnoise.accounting.min_sep_poisson import Separated, band_rows
from rootnoise.accounting.monte_carlo import Mixture
from rootnoise.accounting.random_allocation import SIZES, Interval
from rootnoise.causal import CausalMatrix
from rootnoise.participation import (
    BallsInBins,
    CyclicPoisson,
    MinSeparation,
    MinSepPoisson,
    Participation,
)
from rootnoise.participation.sensitivity import refuse_misfit, sensitivity

# A calibration confirms at most this often; the evaluations share the probability of failure.
ATTEMPTS = 8
# And starts at the noise without amplification times exp(-this), where bounds take little time.
FIRST = 1.5
# A certain bound up to this times the lower one, or a forecast, is claimed in place of a confidence
# bound.
NEAR = 1.05
# Where a first look at the certain bound is so many times a forecast, it is not searched with.
FAR = 1.1
# A calibration by certain bounds ends when it spends this part of epsilon.
CLOSE = 0.985


def privacy_cost(
    participation: Participation,
    n_steps: int,
    noise_multiplier: float,
    delta: float,
    *,
    strategy: CausalMatrix | None = None,
    monte_carlo: MonteCarlo | None = None,
) -> PrivacyCost:
    """Return the epsilon that `noise_multiplier` buys at `delta`, one person added or removed.

    Unamplified: Balle & Wang (2018), Theorem 8, exact. Cyclic Poisson: ceil(n / groups)
    compositions of the Poisson-subsampled Gaussian (Choquette-Choo et al. 2023, Theorem 4; one
    group is DP-SGD) by privacy loss distributions, an upper bound.
    Balls in bins: the lesser of a certain upper bound and, where that is not tight, of an upper
    confidence bound by Monte Carlo. Min-sep Poisson: the latter.

    Args:
        participation: who may take part when.
        n_steps: steps of the run.
        noise_multiplier: standard deviation of Z over clip norm * sensitivity, as `sensitivity`
            defines it for this participation.
        delta: in (0, 1).
        strategy: C; balls in bins and min-sep Poisson need it. Without it the epsilon of cyclic
            Poisson holds for strategies of at most `groups` bands, as `method` says: one group,
            independent noise.
        monte_carlo: how to sample where that is needed.

    Raises:
        RootnoiseError: an argument out of range, n_steps that the participation refuses, or a
            strategy that is missing or does not fit it.

    >>> from rootnoise.participation import SingleParticipation
    >>> round(privacy_cost(SingleParticipation(), 100, 3.7306316348, 1e-5).epsilon, 6)
    1.0
    """
    sigma = real("noise_multiplier", noise_multiplier, above=0)
    real("delta", delta, above=0, below=1)
    _check(participation, n_steps, strategy)
    if isinstance(participation, BallsInBins | MinSepPoisson):
        run = _Run.of(participation, n_steps, strategy, monte_carlo)
        return run.cost(sigma, delta)
    if isinstance(participation, CyclicPoisson):
        q, rounds = participation.probability, participation.rounds(n_steps)
        epsilon, amplified = gaussian.poisson_cost(sigma, q, rounds, delta)
        method = f"PLD of {rounds} Poisson-subsampled Gaussians"
        if not amplified:
            method = f"analytic Gaussian of {rounds} rounds, not amplified"
        if strategy is None and participation.groups > 1:
            method += f", for strategies of at most {participation.groups} bands"
        elif strategy is None:
            method += ", for independent noise"
        return PrivacyCost(epsilon, delta, False, method)
    epsilon = gaussian.gaussian_epsilon(sigma, delta)
    mu = 1 / sigma
    return PrivacyCost(
        epsilon, delta, True, "analytic Gaussian", mu, mu**2 / 2, lower_bound=epsilon
    )


def noise_multiplier(
    participation: Participation,
    n_steps: int,
    epsilon: float,
    delta: float,
    tolerance: float = GRID_TOLERANCE,
    *,
    strategy: CausalMatrix | None = None,
    monte_carlo: MonteCarlo | None = None,
    progress: Progress | None = None,
) -> float:
    """Return the least noise multiplier found that costs at most `epsilon` at `delta`.

    `privacy_cost` with the same arguments confirms it.

    Args:
        participation: who may take part when.
        n_steps: steps of the run.
        epsilon: what may be spent.
        delta: in (0, 1).
        tolerance: part of epsilon that the grid of a privacy loss distribution may waste; a larger
            one is faster, and its noise multiplier larger, never too small.
        strategy: C; balls in bins and min-sep Poisson need it.
        monte_carlo: how to sample where that is needed.
        progress: called with every noise multiplier tried and its epsilon.

    Raises:
        RootnoiseError: an argument out of range, n_steps that the participation refuses, a strategy
            that is missing or does not fit it, or too few samples for this delta.

    >>> from rootnoise.participation import SingleParticipation
    >>> round(noise_multiplier(SingleParticipation(), 100, epsilon=8, delta=1e-5), 6)
    0.600229
    """
    target = real("epsilon", epsilon, above=0)
    real("delta", delta, above=0, below=1)
    tolerance = real("tolerance", tolerance, at_least=GRID_TOLERANCE, below=1)
    _check(participation, n_steps, strategy)
    if isinstance(participation, BallsInBins | MinSepPoisson):
        run = _Run.of(participation, n_steps, strategy, monte_carlo)
        return run.multiplier(target, delta, progress)
    if isinstance(participation, CyclicPoisson):
        q, rounds = participation.probability, participation.rounds(n_steps)
        return gaussian.poisson_multiplier(target, q, rounds, delta, tolerance, progress)
    return gaussian.gaussian_multiplier(target, delta)


def forecast(
    participation: BallsInBins | MinSepPoisson,
    n_steps: int,
    noise_multiplier: float,
    delta: float,
    strategy: CausalMatrix,
) -> float:
    """Return about the epsilon that Monte Carlo would state, from few samples; not to be claimed.

    It takes 1 % of the time of `privacy_cost`, and is infinite where that is hopeless.

    Raises:
        RootnoiseError: as `privacy_cost`.

    >>> from rootnoise.causal import Toeplitz
    >>> round(forecast(BallsInBins(8, 1), 8, 1.5, 1e-5, Toeplitz([1.0], 8)), 1)  # 1.10 in truth
    1.1
    """
    sigma = real("noise_multiplier", noise_multiplier, above=0)
    real("delta", delta, above=0, below=1)
    _check(participation, n_steps, strategy)
    return _guessed(_Run.of(participation, n_steps, strategy, None), sigma, delta)


def noise_multiplier_for(
    participation: Participation, *, mu: float | None = None, rho: float | None = None
) -> float:
    """Return the noise multiplier of a mu-GDP (Dong et al. 2022) or rho-zCDP run (Bun & Steinke).

    Raises:
        RootnoiseError: both or neither, a value out of range, or a participation that amplifies:
            neither number is tight then.

    >>> from rootnoise.participation import SingleParticipation
    >>> noise_multiplier_for(SingleParticipation(), rho=0.5)
    1.0
    """
    if (mu is None) == (rho is None):
        raise RootnoiseError(f"give exactly one of mu and rho, got mu={mu}, rho={rho}")
    if participation.amplified:
        raise RootnoiseError(
            f"participation must not be random for mu and rho, got {participation.type}"
        )
    if rho is not None:
        mu = math.sqrt(2 * real("rho", rho, above=0))
    mu = real("mu", mu, above=0)  # type: ignore[arg-type]
    sigma = 1 / mu
    while 1 / sigma > mu:
        sigma = math.nextafter(sigma, math.inf)
    return sigma


@dataclass(frozen=True)
class _Run:
    """A run whose steps are random, up to its noise; two with the same digest are the same.

    Attributes:
        name: the participation's type.
        digest: of all that the mixture depends on.
        at: its mixture at a noise multiplier.
        bounds: deterministic ones on epsilon, for a noise multiplier, a delta and sizes of grids.
        worst: the sensitivity without amplification, in units of the one that scales the noise.
        settings: of Monte Carlo.
    """

    name: str
    digest: bytes
    at: Callable[[float], Mixture] = field(compare=False)
    bounds: Callable[[float, float, tuple[int, ...]], Interval] = field(compare=False)
    worst: float
    settings: MonteCarlo

    @classmethod
    def of(
        cls,
        participation: BallsInBins | MinSepPoisson,
        n_steps: int,
        strategy: CausalMatrix | None,
        settings: MonteCarlo | None,
    ) -> _Run:
        if strategy is None:
            raise RootnoiseError(f"strategy must be given for participation {participation.type}")
        settings = settings or MonteCarlo()
        scale = sensitivity(strategy, participation).value
        if isinstance(participation, BallsInBins):
            b, square = participation.period, scale**2
            gram, signed = (bin_gram(strategy, b, signed=x) / square for x in (False, True))
            known = _digest(participation, np.stack([gram, signed]))
            return cls(
                participation.type,
                known,
                lambda s: Bins(gram / s**2),
                lambda s, delta, sizes: bin_bounds.bounds(gram / s**2, delta, signed / s**2, sizes),
                1.0,
                settings,
            )
        b, p = participation.min_sep, participation.probability
        rows = band_rows(strategy) / scale
        often = MinSeparation(b, -(-n_steps // b))
        worst = sensitivity(strategy, often).value / scale
        known = _digest(participation, rows)
        return cls(
            participation.type,
            known,
            lambda s: Separated(rows / s, b, p),
            lambda s, delta, sizes: Interval(0.0, math.inf),
            worst,
            settings,
        )

    def cost(self, sigma: float, delta: float) -> PrivacyCost:
        """Return the least of the certain bound, the confidence bound and what holds anyway."""
        alone = gaussian.gaussian_epsilon(sigma / self.worst, delta)
        certain = _bounded(self, sigma, delta)
        # A confidence bound below the certain one is one of the few that fail.
        sampled = math.inf if self.settled(sigma, delta) else _sampled(self, sigma, delta)
        found = max(sampled, certain.lower)
        least = None if certain.lower == 0 else min(certain.lower, alone)
        if min(found, certain.upper) >= alone:  # random or not, the run is one Gaussian mechanism
            method = "analytic Gaussian, not amplified"
            return PrivacyCost(alone, delta, False, method, lower_bound=least)
        if certain.upper <= found:
            method = f"certain upper bound for {self.name}, by sums of log-normals"
            return PrivacyCost(certain.upper, delta, False, method, lower_bound=least)
        method = (
            f"upper confidence bound by Monte Carlo of {self.name}: {self.settings.samples} "
            f"samples each way from seed {self.settings.seed}, too small with probability "
            f"{self.settings.failure:g}"
        )
        return PrivacyCost(
            found, delta, False, method, monte_carlo=self.settings, lower_bound=least
        )

    def settled(self, sigma: float, delta: float) -> bool:
        """Whether the certain bound is so close to the truth, or to a forecast, that it is claimed.

        All bounds hold: this decides which one is stated, and whether samples are drawn for it.
        """
        certain = _bounded(self, sigma, delta)
        if certain.upper <= NEAR * certain.lower:
            return True
        return certain.upper <= NEAR * _guessed(self, sigma, delta, rough=False)

    def multiplier(self, target: float, delta: float, progress: Progress | None) -> float:
        """Search by the certain bound, and by forecasts and samples where that is too far."""
        report: Progress = progress or (lambda sigma, epsilon: None)
        enough = gaussian.gaussian_multiplier(target, delta) * self.worst

        def rough(sigma: float) -> float:
            return _bounded(self, sigma, delta, bin_bounds.QUICK).upper

        def guess(sigma: float) -> float:
            return _guessed(self, sigma, delta)

        def forecast(sigma: float) -> float:
            certain = _bounded(self, sigma, delta, bin_bounds.QUICK)
            # Samples only where they could change which side of the target this is.
            if certain.tight or not certain.lower < target < 2 * certain.upper:
                return certain.upper
            return min(certain.upper, guess(sigma))

        def exact(sigma: float) -> float:
            return self.cost(sigma, delta).epsilon

        def samples(sigma: float) -> float:
            return _sampled(self, sigma, delta)

        # To search by bounds that will not be claimed takes as long as all else.
        if not _bounded(self, enough * math.exp(-FIRST), delta, bin_bounds.QUICK).tight:
            likely = _search(guess, lambda s: target, target, enough, report, CLOSE)
            if rough(likely) > FAR * target:
                found = _search(guess, samples, target, enough, report, 0.0)
                return found if exact(found) <= target else enough
        sure = _search(
            rough, lambda s: _bounded(self, s, delta).upper, target, enough, report, CLOSE
        )
        if self.settled(sure, delta):
            return sure
        return min(sure, _search(forecast, exact, target, enough, report, 0.0))


def _search(
    rough: Callable[[float], float],
    exact: Callable[[float], float],
    target: float,
    enough: float,
    report: Progress,
    close: float,
) -> float:
    """Return the least sigma found at which `exact` is at most the target, or `enough`.

    Args:
        rough: about what `exact` is, in less time.
        exact: an epsilon; evaluated at most ATTEMPTS times.
        target: an epsilon.
        enough: a noise multiplier that is known to be.
        report: called with every noise multiplier tried and its epsilon.
        close: part of the target that is close enough.
    """
    known: dict[float, float] = {}

    def epsilon(log_sigma: float) -> float:
        if log_sigma not in known:
            found = rough(math.exp(log_sigma))
            report(math.exp(log_sigma), found)
            known[log_sigma] = min(found, 10 * target)  # infinite where sigma is far too small
        return known[log_sigma]

    last = math.log(enough)
    high = low = last - FIRST  # a bound takes the less time, the less noise
    aim, best = target, enough
    for _ in range(ATTEMPTS):
        while epsilon(low) <= aim:
            low -= 0.5
        while epsilon(high) > aim and high < last:
            high = min(high + 0.5, last)
        if epsilon(high) > aim:
            break  # amplification does not pay
        low = max(s for s, found in known.items() if found > aim)
        high = min(s for s, found in known.items() if found <= aim)
        sigma = math.exp(brentq(lambda s: epsilon(s) - aim, low, high, xtol=1e-3))  # noqa: B023
        found = exact(sigma)
        report(sigma, found)
        if found <= target:
            best = min(best, sigma)
            if found >= close * target:
                break
        aim *= 0.998 * target / found
    return best


def _check(participation: Participation, n_steps: int, strategy: CausalMatrix | None) -> None:
    """Refuse a strategy that the participation does not cover, as `sensitivity` does."""
    participation.validate(integer("n_steps", n_steps, 1))
    if strategy is None:
        return
    if strategy.n_steps != n_steps:
        raise RootnoiseError(f"strategy must have n_steps={n_steps}, got {strategy.n_steps}")
    refuse_misfit(strategy, participation)


def _digest(participation: Participation, numbers: NDArray[np.float64]) -> bytes:
    content = np.ascontiguousarray(numbers).tobytes()
    return hashlib.blake2b(repr((participation, numbers.shape)).encode() + content).digest()


# A mechanism that is calibrated, saved and loaded asks for the same number each time.
@lru_cache(maxsize=32)
def _sampled(run: _Run, sigma: float, delta: float) -> float:
    attempt = dataclasses.replace(run.settings, failure=run.settings.failure / ATTEMPTS)
    # Its bits: no two noise multipliers share a stream. Whatever a calibration knew when it chose
    # this one, its bound fails with an ATTEMPTS-th of `failure`: the union bound holds.
    (bits,) = struct.unpack("<Q", struct.pack("<d", sigma))
    return estimate.epsilon(run.at(sigma), delta, attempt, bits)


@lru_cache(maxsize=64)
def _guessed(run: _Run, sigma: float, delta: float, *, rough: bool = True) -> float:
    return estimate.forecast(run.at(sigma), delta, run.settings, rough=rough)


@lru_cache(maxsize=64)
def _bounded(run: _Run, sigma: float, delta: float, sizes: tuple[int, ...] = SIZES) -> Interval:
    return run.bounds(sigma, delta, sizes)
