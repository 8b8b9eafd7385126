"""Monte Carlo epsilon of a Gaussian mixture against a Gaussian, as an upper confidence bound.

A person whose steps are drawn at random, pattern pi with probability w_pi, is hidden as well as

    P = sum_pi w_pi N(m_pi, 1)   is from   Q = N(0, 1),      m_pi = sum_{s in pi} |C|[:, s] / sigma

(docs/accounting.md proves it for any lower-triangular C and adaptive gradients; where C >= 0 a
person reaches it). With L = dP/dQ = sum_pi w_pi x_pi, log x_pi = <m_pi, y> - |m_pi|^2 / 2, the run
is (epsilon, delta)-private for

    delta = max(E_Q (L - e^eps)_+, E_Q (1 - e^eps L)_+)        (remove, add).

Both are sampled from R instead of Q, and (...) / (dR/dQ) is averaged. What makes the confidence
bound rigorous is that these samples have a known, small range:

* remove: dR/dQ = (sum_pi w_pi x_pi^theta)^j / kappa is a mixture of Gaussians too, of j patterns at
  a time. As theta >= 1, it is at least L^alpha / kappa with alpha = j theta, and so no sample
  exceeds kappa e^{-(alpha - 1) eps} (alpha - 1)^(alpha - 1) / alpha^alpha. For theta = 1 that is
  the delta that the Renyi divergence of order alpha gives (Canonne, Kamath & Steinke 2020).
* add: R = N(-tau m, 1) with m = sum_pi w_pi m_pi. By Jensen's inequality log L is at least
  <m, y> - g / 2 with g = sum_pi w_pi |m_pi|^2, and so no sample exceeds
  e^{tau g / 2 + tau^2 |m|^2 / 2 - tau eps} tau^tau / (1 + tau)^(1 + tau).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from rootnoise._check import Array
from rootnoise.accounting.confidence import upper
from rootnoise.accounting.cost import MonteCarlo

Samples = tuple[Array, Array]

# Powers theta and tau to choose from: a factor of 1.25 between two costs little of the range.
POWERS = (1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 6.5, 8.0, 10.0, 13.0, 16.0, 24.0)
SHIFTS = (0.0, *np.geomspace(0.1, 300, 40).tolist())
# Samples that choose theta, j and tau; the answer rests on others.
PILOT = 4000
# At least so many bound the add direction.
LEAST = 1000
# Tilts that are compared, of least range, and how much more of it one may have that they are
# compared with.
LIKELY, WIDE = 4, math.log(10)
# Beyond this epsilon nothing is claimed.
HOPELESS = 1000.0
# Exponentials stay far from overflow.
LARGEST = 600.0


@dataclass(frozen=True)
class Tilt:
    """The sampling distribution R of the remove direction: j patterns at a time, power theta.

    Attributes:
        order: j.
        power: theta >= 1.
        log_scale: log kappa, kappa = E_Q (sum_pi w_pi x_pi^theta)^j.
    """

    order: int
    power: float
    log_scale: float

    def log_range(self, epsilon: float) -> float:
        """Return the log of what no sample exceeds."""
        return (
            self.log_scale
            + _log_peak(self.order * self.power - 1)
            - epsilon * (self.order * self.power - 1)
        )

    def epsilon(self, delta: float) -> float:
        """Return where no sample exceeds delta: what the Renyi divergence of this order gives.

        >>> tilt = Tilt(1, 3.0, 1.0)
        >>> round(tilt.log_range(tilt.epsilon(1e-5)) - math.log(1e-5), 9)
        0.0
        """
        excess = self.order * self.power - 1
        if excess <= 0:
            return math.inf
        return max(0.0, (self.log_scale + _log_peak(excess) - math.log(delta)) / excess)


def _log_peak(excess: float) -> float:
    """Return the log of max_l (l - 1)_+ l^-(1 + excess), which max_l (1 - l)_+ l^excess equals."""
    below = excess * math.log(excess) if excess > 0 else 0.0
    return below - (1 + excess) * math.log1p(excess)


class Mixture(ABC):
    """P against Q, in units of the noise.

    Attributes:
        mean_norm2: |m|^2 of the mean m = sum_pi w_pi m_pi.
        mean_square: g = sum_pi w_pi |m_pi|^2.
        block: samples that are drawn at once.
        orders: numbers of patterns at a time that there are tilts of.
    """

    mean_norm2: float
    mean_square: float
    block: int
    orders: tuple[int, ...]

    @abstractmethod
    def tilt(self, order: int, power: float) -> Tilt | None:
        """Return the tilted R of one of `orders`; None where its scale would overflow."""

    @abstractmethod
    def remove(
        self, rng: np.random.Generator, size: int, tilt: Tilt, *others: Tilt
    ) -> tuple[Array, ...]:
        """Return log L and log dR/dQ of samples from the tilted R, then log dR'/dQ of the others.

        Raises:
            FloatingPointError: the likelihood ratios overflow.
        """

    @abstractmethod
    def add(self, rng: np.random.Generator, size: int, tau: float) -> Samples:
        """Return log L and log dR/dQ of samples from N(-tau m, 1)."""

    def add_log_range(self, tau: float, epsilon: float) -> float:
        """Return the log of what no sample of the add direction exceeds."""
        shift = tau * self.mean_square / 2 + tau**2 * self.mean_norm2 / 2
        return shift + _log_peak(tau) - tau * epsilon


@dataclass(frozen=True)
class _Delta:
    """An upper confidence bound on one direction's delta, as a function of epsilon."""

    log_ratio: Array  # of L where removed, of 1/L where added
    log_weight: Array  # of L / R where removed, of 1 / R where added
    log_range: Callable[[float], float]
    failure: float

    def positive(self, epsilon: float) -> Array:
        """Return those of the samples that are not 0."""
        inside = self.log_ratio > epsilon
        gain: Array = -np.expm1(epsilon - self.log_ratio[inside])
        return gain * np.exp(self.log_weight[inside])

    def bound(self, epsilon: float, size: int | None = None) -> float:
        """Return the bound, or what as many samples as `size`, like these, would give."""
        x, drawn = self.positive(epsilon), self.log_ratio.size
        largest = math.exp(min(self.log_range(epsilon), LARGEST))
        mean, square = float(x.sum()) / drawn, float(x @ x) / drawn
        return upper(mean, square, size or drawn, largest, self.failure)

    def enough(self, epsilon: float, delta: float, most: int) -> int:
        """Return how many samples like these would bound half of delta, up to about `most`."""
        size = LEAST
        while size < most and self.bound(epsilon, size) > delta / 2:
            size *= 2
        return size


def epsilon(mixture: Mixture, delta: float, settings: MonteCarlo, evaluation: int = 0) -> float:
    """Return an epsilon that is too small with probability at most `settings.failure`; maybe inf.

    Every `evaluation` (a number >= 0) draws from streams of its own, independent of all others. So
    the promise holds given all results before, also where the mixture was chosen by them, and the
    union bound adds up over the evaluations of a search.

    Both directions have half of it. At a fixed epsilon below the true one, the true delta is above
    the target, and so is the bound on it with probability at least 1 - failure. As the bound falls
    with epsilon, its root then lies above that epsilon. The add direction has fewer samples where
    a pilot says that these will do; how many does not depend on them.
    """
    _, tilt, tau = _choose(mixture, delta, settings)
    half, size = settings.failure / 2, settings.samples
    try:
        removed = _remove(mixture, _stream(settings, 1, evaluation), size, tilt, half)
        if math.isinf(found := _root(removed.bound, delta)):
            return found
        pilot = _add(mixture, _stream(settings, 0, evaluation), PILOT, tau, half)
        size = min(size, pilot.enough(found, delta, size))
        added = _add(mixture, _stream(settings, 2, evaluation), size, tau, half)
    except FloatingPointError:
        return math.inf
    return found if added.bound(found) <= delta else _root(added.bound, delta)


def forecast(mixture: Mixture, delta: float, settings: MonteCarlo) -> float:
    """Return about what `epsilon` will, in a small part of its time and without its confidence."""
    return _choose(mixture, delta, settings)[0]


def _choose(mixture: Mixture, delta: float, settings: MonteCarlo) -> tuple[float, Tilt, float]:
    """Forecast epsilon, and choose the distributions that bound delta best near it."""
    rng = _stream(settings, 0)
    tilts = [Tilt(1, 1.0, 0.0), *_near(mixture, delta)]
    guess = min(tilt.epsilon(delta) for tilt in tilts)
    best, last = tilts[0], None
    if math.isinf(guess):  # hardly any noise
        return guess, best, 0.0
    for _ in range(2):  # near where epsilon was last found
        ranks = {tilt: tilt.log_range(guess) for tilt in tilts}
        likely = sorted(tilts, key=ranks.__getitem__)[:LIKELY]
        if likely == last:
            break
        last = likely
        # The samples of the widest tell of all, those of a narrow one seldom of their largest.
        near = [tilt for tilt in likely if ranks[tilt] <= ranks[likely[0]] + WIDE]
        wide = max(near, key=lambda tilt: tilt.power * tilt.order)
        try:
            pilot = _Pilot.drawn(mixture, rng, wide, likely)
        except FloatingPointError:
            continue
        found = {tilt: pilot.epsilon(tilt, delta, settings) for tilt in likely}
        best = min(likely, key=found.__getitem__)
        guess = min(guess, found[best])
    return guess, best, min(SHIFTS, key=lambda tau: mixture.add_log_range(tau, guess))


@dataclass(frozen=True)
class _Pilot:
    """Samples from one tilt, which tell what those from others would bound.

    As E_R f / r = E_Q f and E_R' (f / r')^2 = E_R f^2 / (r r'), for r = dR/dQ and r' = dR'/dQ.
    """

    log_l: Array
    log_r: Array
    others: dict[Tilt, Array]

    @classmethod
    def drawn(
        cls, mixture: Mixture, rng: np.random.Generator, tilt: Tilt, others: list[Tilt]
    ) -> _Pilot:
        log_l, log_r, *rest = _drawn(
            lambda m: mixture.remove(rng, m, tilt, *others), PILOT, mixture.block
        )
        return cls(log_l, log_r, dict(zip(others, rest, strict=True)))

    def epsilon(self, tilt: Tilt, delta: float, settings: MonteCarlo) -> float:
        """Return about what so many samples from this tilt would bound epsilon by."""

        def bound(epsilon: float) -> float:
            inside = self.log_l > epsilon
            log_f = self.log_l[inside] + np.log(-np.expm1(epsilon - self.log_l[inside]))
            mean = float(np.exp(log_f - self.log_r[inside]).sum()) / PILOT
            both = self.log_r[inside] + self.others[tilt][inside]
            square = float(np.exp(2 * log_f - both).sum()) / PILOT
            largest = math.exp(min(tilt.log_range(epsilon), LARGEST))
            return upper(mean, square, settings.samples, largest, settings.failure / 2)

        return _root(bound, delta)


def _near(mixture: Mixture, delta: float) -> list[Tilt]:
    """Return tilts of about the least range: for each order it falls with the power, then grows.

    The logarithm of kappa is convex in the power, as of a mean of exponentials of such functions.
    So where no sample exceeds delta is quasi-convex: a ratio of a convex function and a linear one.
    """
    found: list[Tilt] = []
    for order in mixture.orders:
        known: dict[int, float] = {}

        def epsilon(place: int) -> float:
            if place not in known:  # noqa: B023 - called below only
                tilt = mixture.tilt(order, POWERS[place])  # noqa: B023
                found.extend([tilt] if tilt else [])
                known[place] = tilt.epsilon(delta) if tilt else math.inf  # noqa: B023
            return known[place]  # noqa: B023

        low, high = 0, len(POWERS) - 1
        while low < high:
            middle = (low + high) // 2
            if epsilon(middle) <= epsilon(middle + 1):
                high = middle
            else:
                low = middle + 1
    return found


def _remove(
    mixture: Mixture, rng: np.random.Generator, size: int, tilt: Tilt, failure: float
) -> _Delta:
    log_l, log_r = _drawn(lambda m: mixture.remove(rng, m, tilt), size, mixture.block)
    return _Delta(log_l, log_l - log_r, tilt.log_range, failure)


def _add(
    mixture: Mixture, rng: np.random.Generator, size: int, tau: float, failure: float
) -> _Delta:
    log_l, log_r = _drawn(lambda m: mixture.add(rng, m, tau), size, mixture.block)
    return _Delta(-log_l, -log_r, lambda e: mixture.add_log_range(tau, e), failure)


def _drawn(draw: Callable[[int], tuple[Array, ...]], size: int, block: int) -> list[Array]:
    parts = [draw(min(block, size - start)) for start in range(0, size, block)]
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def _root(function: Callable[[float], float], delta: float) -> float:
    """Return where a falling function reaches delta, from above; inf where it does not."""
    if function(0.0) <= delta:
        return 0.0
    high = 0.5
    while not function(high) <= delta:
        high *= 2
        if high > HOPELESS:
            return math.inf
    low = high / 2 if high > 0.5 else 0.0
    root = float(brentq(lambda e: function(e) - delta, low, high, xtol=1e-6, rtol=1e-6))
    while function(root) > delta:
        root += 1e-6 * (1 + root)
    return root


def _stream(settings: MonteCarlo, purpose: int, evaluation: int = 0) -> np.random.Generator:
    """Return the stream of the pilot (0), the remove (1) or the add direction (2)."""
    words = (purpose, evaluation >> 32, evaluation & 0xFFFFFFFF)
    return np.random.Generator(
        np.random.PCG64(np.random.SeedSequence(settings.seed, spawn_key=words))
    )
