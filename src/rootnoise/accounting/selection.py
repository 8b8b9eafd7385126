"""The privacy of tuning: a random number of trials, of which the best alone is released.

To train several times and keep the best costs more than one training, and a fixed number of trials
costs as many. If the number of trials is random and secret, the best one costs little more than one
(Liu and Talwar, 2019; Papernot and Steinke, 2022, "Hyperparameter tuning with Renyi differential
privacy"). Proofs are on the page Tuning of the documentation.

A trial is a run that is mu-Gaussian differentially private whatever its hyperparameters, which are
drawn from the grid without looking at the data. Every number is rounded to the private side.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr

from rootnoise import _limits
from rootnoise._check import Array, RootnoiseError, integer, real, set_fields
from rootnoise.accounting.cost import PrivacyCost
from rootnoise.accounting.gaussian import gaussian_delta, gaussian_epsilon
from rootnoise.accounting.run import privacy_cost
from rootnoise.participation import Participation

ROOT = math.sqrt(2 * math.pi)
MOST_TRIALS = 1e6
# The bound on a ratio exceeds its least upper bound by at most so much.
TOLERANCE, MOST_CELLS = 1e-7, 20_000
# Covers the rounding of sums and logarithms, relative.
ROUNDING = 1e-11
# More trials than anybody makes; their chances take 0.2 s.
MOST_DRAWN = 1000
# Chances of so little are left out of a draw.
TAIL = 1e-40
BITS = 256  # of a draw's uniform numbers: its chances are those of the table
# JSON has no infinity.
POISSON = "poisson"


@dataclass(frozen=True)
class Trials:
    """The distribution of the number of trials.

    Truncated negative binomial on 1, 2, ...: shape 1 is geometric, shape 0 logarithmic; or Poisson,
    of shape infinity, where the number may be 0 and then nothing is released. The larger the shape,
    the less the number varies, and the more the tuning costs.

    Args:
        mean: expected number of trials, in [1.01, 1e6].
        shape: eta, in [0, 100] or infinity.

    Raises:
        RootnoiseError: a value out of range.

    >>> Trials(mean=10).gamma  # geometric: 1 / mean
    0.1
    """

    mean: float
    shape: float = 1.0

    def __post_init__(self) -> None:
        mean = real("mean", self.mean, at_least=1.01, at_most=MOST_TRIALS)
        if self.shape != math.inf:
            real("shape", self.shape, at_least=0, at_most=100)
        set_fields(self, mean=mean, shape=float(self.shape))

    @property
    def gamma(self) -> float:
        """The distribution's other parameter, in (0, 1), which gives the mean; 0 for Poisson."""
        if self.shape == math.inf:
            return 0.0
        if self.shape == 1:
            return 1 / self.mean
        low = -2 * math.log(self.mean) - 10  # log gamma: the mean is at least (1 / gamma - 1) / 10
        found = brentq(lambda x: _log_mean(x, self.shape) - math.log(self.mean), low, -1e-9)
        return math.exp(found)

    def probabilities(self, most: int) -> Array:
        """Return the probabilities of 0, 1, ..., `most` trials.

        >>> Trials(mean=2).probabilities(3)
        array([0.   , 0.5  , 0.25 , 0.125])
        """
        k = np.arange(integer("most", most, 1) + 1)
        if self.shape == math.inf:
            steps = np.log(self.mean) - np.log(np.maximum(k, 1))
            steps[0] = -self.mean
            return np.asarray(np.exp(np.cumsum(steps)))
        gamma, eta = self.gamma, self.shape
        # P(k + 1) / P(k) = (1 - gamma) (k + eta) / (k + 1)
        ratios = np.log1p(-gamma) + np.log((k[1:-1] + eta) / (k[1:-1] + 1))
        first = math.log1p(-gamma) - math.log(-math.log(gamma))
        if eta > 0:
            first = (
                math.log1p(-gamma) + math.log(eta) - math.log(math.expm1(-eta * math.log(gamma)))
            )
        return np.concatenate([[0.0], np.exp(np.cumsum([first, *ratios]))])

    def draw(self, bits: Callable[[int], int] = secrets.randbits) -> int:
        """Return a number of trials by the operating system's randomness; keep it secret.

        Step by step: no more than k, given at least k, with chance P(k) / (P(k) + P(k + 1) + ...).
        Sums from the far end keep the least chances to 13 digits too, and a number of `BITS` bits
        meets them exactly: a uniform float would not.

        Args:
            bits: returns a secret uniform integer of so many bits; another is for tests alone.

        Raises:
            RootnoiseError: a mean over 1000.
        """
        mean = real("mean of trials that are made", self.mean, at_most=MOST_DRAWN)
        chances = self.probabilities(_furthest(mean, self.gamma, self.shape))
        left = np.cumsum(chances[::-1])[::-1]
        for k in np.flatnonzero((left > TAIL) & (chances > 0)):
            if Fraction(bits(BITS), 2**BITS) < Fraction(float(chances[k] / left[k])):
                return int(k)
        raise RootnoiseError("secret randomness must be uniform, got a number of chance 1e-40")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description; the shape of Poisson is "poisson".

        >>> Trials(mean=10, shape=math.inf).to_dict()
        {'mean': 10.0, 'shape': 'poisson'}
        """
        return {"mean": self.mean, "shape": POISSON if self.shape == math.inf else self.shape}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Trials:
        """Rebuild what `to_dict` describes.

        Raises:
            RootnoiseError: other fields than these, or a value out of range.
        """
        if not isinstance(fields, Mapping) or fields.keys() != {"mean", "shape"}:
            raise RootnoiseError(f"trials must have a mean and a shape, got {fields!s:.60}")
        shape = fields["shape"]
        return cls(fields["mean"], math.inf if shape == POISSON else shape)

    def __str__(self) -> str:
        if self.shape == math.inf:
            return f"Poisson of mean {self.mean:g}"
        return f"truncated negative binomial of shape {self.shape:g} and mean {self.mean:g}"


def tuned_privacy_cost(
    participation: Participation,
    n_steps: int,
    noise_multiplier: float,
    delta: float,
    trials: Trials,
) -> PrivacyCost:
    """Return the privacy of releasing the best of a random number of trials, and nothing else.

    Each trial draws its hyperparameters at random, independently of the data, and has a key of its
    own. The best is that of the highest score; scores, the number of trials, and all other trials
    stay secret. A score must not be computed from data that the guarantee is to cover, unless
    from the trial's release: then it is part of it.

    Truncated negative binomial: by the profile of the Gaussian mechanism, epsilon at delta / mean,
    plus a ratio (docs: Tuning, Theorem 1; after Papernot and Steinke, 2022, Lemma 7, and Koskela,
    Redberg and Wang, 2024). Poisson: Papernot and Steinke (2022), Theorem 6, at the best order.

    Args:
        participation: who may take part when, in each trial.
        n_steps: steps of a trial.
        noise_multiplier: of each trial, whatever its clip norm.
        delta: in (0, 1).
        trials: how many.

    Raises:
        RootnoiseError: a value out of range, or random steps, whose trials are not Gaussian.

    >>> from rootnoise.participation import FixedCycle
    >>> cycle = FixedCycle(period=10, epochs=4)
    >>> alone = privacy_cost(cycle, 40, 3.7306, 1e-5)
    >>> tuned = tuned_privacy_cost(cycle, 40, 3.7306, 1e-5, Trials(mean=10))
    >>> round(alone.epsilon, 3), round(tuned.epsilon, 3)
    (1.0, 1.625)
    """
    if participation.amplified:
        raise RootnoiseError(
            "participation must have steps that are not random for tuning (a fixed cycle, say), "
            f"got {participation.type}"
        )
    alone = privacy_cost(participation, n_steps, noise_multiplier, delta)
    if trials.shape == math.inf:
        epsilon = _poisson(noise_multiplier, delta, trials.mean)
        method = "private selection, Papernot & Steinke 2022, Theorem 6"
    else:
        epsilon = _negative_binomial(noise_multiplier, delta, trials)
        method = "private selection by privacy profiles"
    said = f"{method}, of trials that are one Gaussian mechanism; their number is {trials}"
    return PrivacyCost(max(epsilon, alone.epsilon), delta, False, said)


# Each trial of a tuning asks for the same number.
@lru_cache(maxsize=32)
def tuned_noise_multiplier(
    participation: Participation, n_steps: int, epsilon: float, delta: float, trials: Trials
) -> float:
    """Return the least noise multiplier of a trial found with which tuning spends `epsilon`.

    Args:
        participation: who may take part when, in each trial.
        n_steps: steps of a trial.
        epsilon: of the release, > 0; `tuned_privacy_cost` is at most this.
        delta: in (0, 1).
        trials: how many.

    Raises:
        RootnoiseError: a value out of range, or random steps.

    >>> from rootnoise.participation import SingleParticipation
    >>> once = SingleParticipation()
    >>> sigma = tuned_noise_multiplier(once, 40, 2.0, 1e-5, Trials(mean=10))
    >>> 1.999 < tuned_privacy_cost(once, 40, sigma, 1e-5, Trials(mean=10)).epsilon <= 2
    True
    """
    goal = _limits.epsilon(epsilon)

    def over(log_sigma: float) -> float:
        sigma = math.exp(log_sigma)
        return tuned_privacy_cost(participation, n_steps, sigma, delta, trials).epsilon - goal

    low, high = -1.0, 1.0
    while over(high) > 0:
        low, high = high, high + 2
    while over(low) <= 0:
        low, high = low - 2, low
    found = brentq(over, low, high, xtol=1e-9)
    step = 1e-9
    while over(found) > 0:  # brentq may end on either side
        found, step = found + step, 2 * step
    return math.exp(found)


def _furthest(mean: float, gamma: float, shape: float) -> int:
    """Return a number of trials beyond which less than `TAIL` is left."""
    if gamma == 0:
        return int(mean + 60 * math.sqrt(mean) + 200)
    # P(k) is at most of the order of (1 - gamma)^k k^(shape - 1).
    k, rate = 100.0, -math.log1p(-gamma)
    for _ in range(20):  # a fixed point, as the logarithm is flat
        k = (110 + max(0.0, shape - 1) * math.log(k)) / rate
    return int(k) + 100


def _negative_binomial(sigma: float, delta: float, trials: Trials) -> float:
    """Return epsilon(delta / mean) + log sup f'(x) / f'(x'), f(x) the expectation of x^K.

    f' is proportional to (1 - (1 - gamma) x)^-(1 + eta). x and x' are the chances that a trial is
    not better than some output, with and without one person: the chances that it is are, at the
    worst, Phi(z) and Phi(z + mu).
    """
    gamma = trials.gamma
    ratio = (1 + trials.shape) * largest_log_ratio(gamma / (1 - gamma), 1 / sigma)
    mean = math.exp(_log_mean(math.log(gamma), trials.shape)) * (1 + ROUNDING)
    return (gaussian_epsilon(sigma, delta / mean) + ratio) * (1 + ROUNDING)


def largest_log_ratio(offset: float, mu: float) -> float:
    """Return an upper bound on log((c + Phi(z + mu)) / (c + Phi(z))) for all z, c the offset > 0.

    On a cell [a, b] it is at most log(c + Phi(b + mu)) - log(c + Phi(a)), and at most mu times the
    largest slope of log(c + Phi) on [a, b + mu], which is at most max phi / (c + Phi(a)). Cells
    that could hold the largest are cut until the bound is within `TOLERANCE` of a value, or they
    are `MOST_CELLS`: for a small mu it may be 5 mu of itself too large. Outside of all cells both
    chances are 0 or 1 to all digits, and the ratio is 1.
    """
    edges = np.linspace(-40 - mu, 40, 4097)
    low, high = edges[:-1], edges[1:]
    while True:
        nearest = np.clip(0.0, low, high + mu)  # where phi is largest
        slope = np.exp(-(nearest**2) / 2) / ROOT / (offset + ndtr(low))
        most = np.minimum(_log_ratio(offset, high + mu, low), mu * slope)
        reached = float(_log_ratio(offset, high + mu, high).max())
        top = float(most.max())
        kept = most > reached
        if top <= reached + TOLERANCE or np.count_nonzero(kept) > MOST_CELLS:
            return top * (1 + ROUNDING) + ROUNDING
        cuts = np.linspace(low[kept], high[kept], 9)
        low, high = cuts[:-1].ravel(), cuts[1:].ravel()


def _log_ratio(offset: float, above: Array, below: Array) -> Array:
    return np.asarray(np.log(offset + ndtr(above)) - np.log(offset + ndtr(below)))


def _poisson(sigma: float, delta: float, mean: float) -> float:
    """Return the least epsilon over the orders a of Theorem 6.

    A trial is (a, a mu^2 / 2)-Renyi private, and (e, d)-private with e = log(1 + 1 / (a - 1)) and d
    the Gaussian's own at e. So the best is (a, a mu^2 / 2 + mean d + log(mean) / (a - 1))-Renyi
    private, which is turned into (epsilon, delta) by Canonne, Kamath and Steinke (2020),
    Proposition 12.
    """
    best = math.inf
    for above in np.geomspace(1e-3, 1e5, 600):  # a - 1
        order = 1 + float(above)
        renyi = order / (2 * sigma**2) + mean * gaussian_delta(sigma, math.log1p(1 / above))
        renyi += math.log(mean) / above
        turned = renyi + math.log1p(-1 / order) - math.log(delta * order) / above
        best = min(best, turned)
    return max(0.0, best) * (1 + ROUNDING) + ROUNDING


def _log_mean(log_gamma: float, shape: float) -> float:
    """Return the log of eta (1 - gamma) / (gamma (1 - gamma^eta)), its limit for eta = 0."""
    rest = -math.expm1(log_gamma)  # 1 - gamma
    if shape == 0:
        return math.log(rest / -log_gamma) - log_gamma
    return math.log(shape * rest / -math.expm1(shape * log_gamma)) - log_gamma
