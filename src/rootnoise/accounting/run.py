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

from rootnoise._check import RootnoiseError, integer, real
from rootnoise.accounting import bin_bounds, gaussian
from rootnoise.accounting import monte_carlo as estimate
from rootnoise.accounting.balls_in_bins import Bins, bin_gram
from rootnoise.accounting.cost import MonteCarlo, PrivacyCost, Progress
from rootnoise.accounting.gaussian import GRID_TOLERANCE
from rootnoise.accounting.min_sep_poisson import Separated, band_rows
from rootnoise.accounting.monte_carlo import Mixture
from rootnoise.accounting.random_allocation import SIZES
from rootnoise.causal import CausalMatrix
from rootnoise.participation import (
    BallsInBins,
    CyclicPoisson,
    MinSeparation,
    MinSepPoisson,
    Participation,
)
from rootnoise.participation.sensitivity import refuse_misfit, sensitivity

# A calibration draws samples at most this often; all these share the probability of failure.
ATTEMPTS = 8
# And starts at the noise without amplification times exp(-this).
FIRST = 0.5
# Epsilon falls about as fast as the noise multiplier to minus this power; two points tell it whose
# epsilons differ by more than this factor (as a logarithm), or chance and rounding would.
SLOPE, FLAT = 1.7, 0.05
# How far from epsilon a forecast ends: they vary so much by chance.
NOISE = 0.02
# A certain bound up to this times a forecast is claimed in place of a confidence bound.
NEAR = 1.05
# Where a first look at it is more times a forecast, it is not searched with.
FAR = 1.08
# A calibration ends when it leaves at most this part of epsilon.
CLOSE = 0.015


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
        above: a certain upper bound, for a noise multiplier, a delta and sizes of grids.
        below: a certain lower bound, for a noise multiplier, a delta and the upper one.
        tight: the upper one leaves nothing to samples.
        worst: the sensitivity without amplification, in units of the one that scales the noise.
        settings: of Monte Carlo.
    """

    name: str
    digest: bytes
    at: Callable[[float], Mixture] = field(compare=False)
    above: Callable[[float, float, tuple[int, ...]], float] = field(compare=False)
    below: Callable[[float, float, float], float] = field(compare=False)
    tight: bool
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
                lambda s, delta, sizes: bin_bounds.above(gram / s**2, delta, sizes),
                lambda s, delta, upper: bin_bounds.below(signed / s**2, delta, upper),
                bin_bounds.tight(gram),
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
            lambda s, delta, sizes: math.inf,
            lambda s, delta, upper: 0.0,
            False,
            worst,
            settings,
        )

    def cost(self, sigma: float, delta: float) -> PrivacyCost:
        """Return the least of the certain bound, the confidence bound and what holds anyway."""
        alone = gaussian.gaussian_epsilon(sigma / self.worst, delta)
        lower, upper = _below(self, sigma, delta), _above(self, sigma, delta)
        # A confidence bound below the certain one is one of the few that fail.
        sampled = math.inf if self.settled(sigma, delta) else _sampled(self, sigma, delta)
        found = max(sampled, lower)
        least = None if lower == 0 else min(lower, alone)
        if min(found, upper) >= alone:  # random or not, the run is one Gaussian mechanism
            method = "analytic Gaussian, not amplified"
            return PrivacyCost(alone, delta, False, method, lower_bound=least)
        if upper <= found:
            method = f"certain upper bound for {self.name}, by sums of log-normals"
            return PrivacyCost(upper, delta, False, method, lower_bound=least)
        method = (
            f"upper confidence bound by Monte Carlo of {self.name}: {self.settings.samples} "
            f"samples from seed {self.settings.seed}, too small with probability "
            f"{self.settings.failure:g}"
        )
        return PrivacyCost(
            found, delta, False, method, monte_carlo=self.settings, lower_bound=least
        )

    def settled(self, sigma: float, delta: float) -> bool:
        """Whether the certain bound is so close to a forecast that it is claimed.

        All bounds hold: this decides which one is stated, and whether samples are drawn for it.
        """
        return self.tight or _above(self, sigma, delta) <= NEAR * _guessed(self, sigma, delta)

    def multiplier(self, target: float, delta: float, progress: Progress | None) -> float:
        """Search by a forecast first, then by the certain bound, then by samples if it is far."""
        report: Progress = progress or (lambda sigma, epsilon: None)
        enough = gaussian.gaussian_multiplier(target, delta) * self.worst

        def guess(sigma: float) -> float:
            return _guessed(self, sigma, delta)

        def look(sigma: float) -> float:
            return _above(self, sigma, delta, bin_bounds.QUICK)

        search, sure = _Search(target, enough, report), enough
        if not self.tight:
            search.follow(guess, NOISE, above=NOISE)
        # To search by bounds that will not be claimed takes as long as all else.
        if self.tight or look(search.next) <= FAR * target:
            likely = search.next
            search.follow(look, CLOSE)
            sure = search.follow(lambda s: _above(self, s, delta), CLOSE)
            if self.settled(sure, delta):
                return sure
            search.next = min(sure, likely)
        found = min(sure, search.follow(lambda s: _sampled(self, s, delta), CLOSE))
        if _above(self, found, delta) < (1 - CLOSE) * target:  # the look was a coarse one
            return min(found, search.follow(lambda s: _above(self, s, delta), CLOSE))
        return found if self.cost(found, delta).epsilon <= target else sure


class _Search:
    """Search for the least noise multiplier that costs at most a target.

    Epsilon falls about as a power of the noise multiplier, whichever bound or forecast is asked: so
    each goes on from where the last one ended.

    Attributes:
        next: the noise multiplier to be tried next.
    """

    def __init__(self, target: float, enough: float, report: Progress) -> None:
        self.next = enough * math.exp(-FIRST)
        self._target, self._enough, self._report = target, enough, report
        self._slope = SLOPE

    def follow(self, ask: Callable[[float], float], below: float, *, above: float = 0.0) -> float:
        """Return the least noise multiplier found, or `enough`, that needs no search.

        Args:
            ask: an epsilon; less than ATTEMPTS times.
            below: part of the target that may be left.
            above: part by which it may be exceeded.
        """
        best, last = self._enough, None
        low, high = -math.inf, math.log(self._enough)
        for _ in range(ATTEMPTS - 1):  # what is stated in the end may be one more
            sigma = self.next
            found = ask(sigma)
            self._report(sigma, found)
            # Infinite where sigma is far too small.
            at = math.log(sigma), math.log(min(max(found, 0.1 * self._target), 10 * self._target))
            if found <= (1 + above) * self._target:
                best, high = min(best, sigma), min(high, at[0])
            else:
                low = max(low, at[0])
            if last is not None and abs(at[1] - last[1]) > FLAT:
                self._slope = min(5.0, max(0.5, (last[1] - at[1]) / (at[0] - last[0])))
            last = at
            done = (1 - below) * self._target <= found <= (1 + above) * self._target
            aim = math.log(self._target) + (above - below) / 2
            step = at[0] + (at[1] - aim) / self._slope
            if not done and not low < step < high:  # a point known to be too far
                step = (max(low, high - 1) + high) / 2
            self.next = math.exp(step)
            if done or high - low < 1e-3:
                break
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
def _guessed(run: _Run, sigma: float, delta: float) -> float:
    return estimate.forecast(run.at(sigma), delta, run.settings)


@lru_cache(maxsize=64)
def _above(run: _Run, sigma: float, delta: float, sizes: tuple[int, ...] = SIZES) -> float:
    return run.above(sigma, delta, sizes)


@lru_cache(maxsize=64)
def _below(run: _Run, sigma: float, delta: float) -> float:
    return run.below(sigma, delta, _above(run, sigma, delta))
