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
# And those of a rough forecast, which chooses nothing.
FEW = 2000
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
    """

    mean_norm2: float
    mean_square: float
    block: int

    @abstractmethod
    def tilts(self) -> list[Tilt]:
        """Return the sampling distributions to choose from; P itself, (1, 1.0, 0.0), is one."""

    @abstractmethod
    def remove(self, rng: np.random.Generator, size: int, tilt: Tilt) -> Samples:
        """Return log L and log dR/dQ of samples from the tilted R.

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


def epsilon(mixture: Mixture, delta: float, settings: MonteCarlo, evaluation: int = 0) -> float:
    """Return an epsilon that is too small with probability at most `settings.failure`; maybe inf.

    Every `evaluation` (a number >= 0) draws from streams of its own, independent of all others. So
    the promise holds given all results before, also where the mixture was chosen by them, and the
    union bound adds up over the evaluations of a search.

    Both directions have half of it. At a fixed epsilon below the true one, the true delta is above
    the target, and so is the bound on it with probability at least 1 - failure. As the bound falls
    with epsilon, its root then lies above that epsilon.
    """
    _, tilt, tau = _choose(mixture, delta, settings)
    half, size = settings.failure / 2, settings.samples
    try:
        removed = _remove(mixture, _stream(settings, 1, evaluation), size, tilt, half)
        if math.isinf(found := _root(removed.bound, delta)):
            return found
        added = _add(mixture, _stream(settings, 2, evaluation), size, tau, half)
    except FloatingPointError:
        return math.inf
    return found if added.bound(found) <= delta else _root(added.bound, delta)


def forecast(mixture: Mixture, delta: float, settings: MonteCarlo, *, rough: bool = False) -> float:
    """Return about what `epsilon` will, in a small part of its time and without its confidence.

    A rough one takes a quarter of that again: within 2 % of the other up to 100 bins, 8 % with 500.
    """
    return _choose(mixture, delta, settings, *((FEW, 2) if rough else (PILOT, 4)))[0]


def _choose(
    mixture: Mixture, delta: float, settings: MonteCarlo, size: int = PILOT, most: int = 4
) -> tuple[float, Tilt, float]:
    """Forecast epsilon, and choose the distributions that bound delta best near it.

    Args:
        mixture: P against Q.
        delta: in (0, 1).
        settings: of the samples that the forecast is for.
        size: samples of each distribution that is tried.
        most: distributions that are tried at an epsilon.
    """
    rng = _stream(settings, 0)
    tilts = mixture.tilts()
    guess = _root(lambda e: math.exp(min(0.0, *(tilt.log_range(e) for tilt in tilts))), delta)

    def bounded(tilt: Tilt) -> tuple[float, Tilt]:
        try:
            drawn = _remove(mixture, rng, size, tilt, settings.failure / 2)
        except FloatingPointError:
            return math.inf, tilt
        return _root(lambda e: drawn.bound(e, settings.samples), delta), tilt

    for _ in range(2):  # those of least range where epsilon was last found
        likely = sorted(tilts, key=lambda tilt: tilt.log_range(guess))[:most]
        found, best = min(map(bounded, likely), key=lambda pair: pair[0])
        guess = min(guess, found)
    return guess, best, min(SHIFTS, key=lambda tau: mixture.add_log_range(tau, guess))


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


def _drawn(draw: Callable[[int], Samples], size: int, block: int) -> Samples:
    parts = [draw(min(block, size - start)) for start in range(0, size, block)]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


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
