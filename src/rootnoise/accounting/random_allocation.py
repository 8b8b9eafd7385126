"""The mean of equally correlated log-normals, in both directions and from both sides; no sampling.

Let b means be equally likely and have the Gram matrix own I + shared 1 1^T, in units of the noise.
Under Q = N(0, 1) the likelihood ratio of their mixture P is, with independent normal z_i and w,

    L = e^{sqrt(shared) w - shared / 2} S / b,   S = sum_i X_i,   X_i = e^{sqrt(own) z_i - own / 2}.

The law of S on a grid of width h is the b-fold convolution of one X; w is integrated by the formula
of Black and Scholes. With K = e^eps and e^-eps the two deltas are

    remove: E_Q (L - K)_+     = E_P call(S / b) / (S / b),
    add:    E_Q (1 - L / K)_+ = E_Q put(S / b) / K,

where P draws one X_i by its size-biased law x p(x), and both integrands are in [0, 1].

Upper bounds. X is cut at M, which costs at most call(M) of the X alone, as the slope of the
integrand in S / b is at most one. A value between two points of the grid is shared out so that its
mean is kept: that adds to S a sum R of mean zero given S, and so can only raise the expectation of
a convex function.

Lower bounds. R has b independent terms of range h, so that E (+-R - t)_+ <= b h^2 / (4 e t)
e^{-2 t^2 / (b h^2)} (Hoeffding 1963); and what is monotone of slope at most 1 / b exceeds at
S + R -+ t its value at S by at most (+-R - t)_+ / b.

docs/accounting.md has the proofs and the rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.fft import irfft, rfft
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr, ndtri

from rootnoise._check import Array
from rootnoise.accounting.composition import ETA, UNIT
from rootnoise.accounting.subsampled import NODES, PIECE, WEIGHTS

# Part of delta that X beyond M, sums beyond the window, and R beyond t may cost, each.
SPARE = 1e-3
# Points of the window, tried in turn until both bounds are within `CLOSE` of each other.
SIZES = (2**14, 2**16, 2**18, 2**20, 2**21)
CLOSE = 5e-3
# Masses and means of X are known to this part, for logarithms z up to 40 and variances up to 400.
RELATIVE = 1e-12
LARGEST, HIGHEST = 400.0, 40.0
# Phi(-12) < 2e-33: lower values of X are of no account.
LOWEST = -12.0
# Beyond this epsilon nothing is stated.
HOPELESS = 500.0
CHERNOFF = tuple(np.geomspace(0.25, 64.0, 17).tolist())


@dataclass(frozen=True)
class Interval:
    """Two certain bounds on one epsilon.

    Attributes:
        lower: 0 where nothing is stated.
        upper: infinite where nothing is stated.
    """

    lower: float
    upper: float

    @property
    def tight(self) -> bool:
        """Whether the bounds are within 2 % of each other."""
        return self.upper <= 1.02 * self.lower


@dataclass(frozen=True)
class Allocation:
    """One of b means is drawn, all equally long and equally close, in units of the noise.

    Attributes:
        bins: b >= 1.
        own: squared length of a mean, less `shared`.
        shared: product of every two means, >= 0.
    """

    bins: int
    own: float
    shared: float = 0.0

    def epsilon(self, delta: float, sizes: tuple[int, ...] = SIZES) -> Interval:
        """Return bounds on epsilon at `delta`, from the first grid whose two are close, or all.

        >>> found = Allocation(bins=100, own=1.0).epsilon(1e-5)
        >>> round(found.lower, 2), round(found.upper, 2)
        (0.62, 0.62)
        """
        lower, upper = 0.0, math.inf
        if not 0 < self.own <= LARGEST:
            return Interval(lower, upper)
        for size in sizes:
            grid = _Grid.of(self, delta, size)
            if grid is None:
                continue
            # Positions of masses are known to a part of RELATIVE: K is off by as much.
            upper = min(upper, _crossing(grid.above, delta)[1] + 4 * RELATIVE)
            lower = max(lower, _crossing(grid.below, delta)[0] - 4 * RELATIVE)
            if upper - lower <= CLOSE * upper:
                break
        return Interval(lower, upper)


@dataclass(frozen=True, eq=False)
class _Grid:
    """The law of S + R on 0, h, 2 h, ...

    Attributes:
        bins: what it is of.
        width: h.
        removed: under P.
        added: under Q.
        error: of either law, in l2.
        lost: probability of a sum outside the window, under either.
        cut: E (X - M)_+, at most.
        slip: t.
        slipped: E (+-R - t)_+ / b, at most.
    """

    bins: Allocation
    width: float
    removed: Array
    added: Array
    error: float
    lost: float
    cut: float
    slip: float
    slipped: float

    @classmethod
    def of(cls, bins: Allocation, delta: float, size: int) -> _Grid | None:
        """Return the laws in a window of `size` points, or None where they do not fit."""
        b, own = bins.bins, bins.own
        root = math.sqrt(own)
        # E (X - M)_+ <= E X 1(X > M) = Phi(own / 2 - log M over root).
        most = math.exp(min(own / 2 - float(ndtri(SPARE * delta)) * root, HOPELESS))
        window = 2.0 * b + 1.25 * most
        for _ in range(8):
            h = window / size
            top = math.ceil(most / h)
            masses = _masses(own, h, top)
            lost = _beyond(masses, h, b, window)
            if lost <= SPARE * delta:
                break
            window *= 1.5
        else:
            return None
        biased = h * np.arange(top + 1.0) * masses
        added, removed, error = _powers(masses, biased, b, size)
        cut = float(ndtr((own / 2 - math.log(top * h)) / root)) * (1 + RELATIVE)
        slip = h * math.sqrt(b / 2 * math.log(1 / (SPARE * delta)))
        slipped = h * h / (4 * math.e * slip) * math.exp(-2 * slip**2 / (b * h * h)) * (1 + 1e-9)
        return cls(bins, h, removed, added, error, lost, cut, slip, slipped)

    def above(self, epsilon: float) -> float:
        """Return an upper bound on delta."""
        removal, removal_error = self._removal(epsilon, 0.0)
        addition, addition_error = self._addition(epsilon, 0.0)
        remove = removal + removal_error + self.cut + self.lost
        add = min(addition + addition_error + self.lost, self._geometric(epsilon))
        return max(remove, add) * (1 + self._short())

    def below(self, epsilon: float) -> float:
        """Return a lower bound on delta."""
        removal, removal_error = self._removal(epsilon, self.slip)
        addition, addition_error = self._addition(epsilon, self.slip)
        slope = math.exp(min(epsilon, HOPELESS))
        remove = removal * (1 - self._short()) - removal_error - self.lost - self.slipped
        add = addition * (1 - self._short()) - addition_error - self.lost
        return max(remove, add - slope * (self.cut + self.slipped))

    def _short(self) -> float:
        """Return what masses of b factors, and sums of as many terms, may be off by."""
        return 4 * self.bins.bins * RELATIVE + 4 * UNIT * self.added.size

    def _removal(self, epsilon: float, slip: float) -> tuple[float, float]:
        """Return E_P call(S + R - slip) / (S + R), and its error."""
        h, shared, size = self.width, self.bins.shared, self.removed.size
        level = self.bins.bins * math.exp(min(epsilon, HOPELESS))
        start = slip + (level if shared == 0 else 0.0)  # below it there is nothing
        first = max(1, math.floor(min(start / h, float(size))))
        s = h * np.arange(first, size, dtype=np.float64)
        moved = np.maximum(s - slip, 0.0)
        if shared == 0:
            g = np.maximum(moved - level, 0.0) / s
        else:
            d, half = _normal(moved / level, shared)
            g = np.clip((moved * ndtr(d + half) - level * ndtr(d - half)) / s, 0.0, 1.0)
        return self._mean(self.removed[first:], g)

    def _addition(self, epsilon: float, slip: float) -> tuple[float, float]:
        """Return E_Q put(S + R + slip) / K, and its error."""
        h, shared, size = self.width, self.bins.shared, self.added.size
        level = self.bins.bins * math.exp(-min(epsilon, HOPELESS))
        last = size if shared > 0 else min(size, math.ceil(level / h) + 1)
        ratio = (h * np.arange(last, dtype=np.float64) + slip) / level
        if shared == 0:
            g = np.maximum(1 - ratio, 0.0)
        else:
            d, half = _normal(ratio, shared)
            g = np.clip(ndtr(half - d) - ratio * ndtr(-d - half), 0.0, 1.0)
        return self._mean(self.added[:last], g)

    def _mean(self, law: Array, g: Array) -> tuple[float, float]:
        """Return the mean of g, itself known to 32 u, and what it is off by at most."""
        error = float(np.linalg.norm(g)) * self.error + 32 * UNIT * (1 + float(law.sum()))
        return float(law @ g), error

    def _geometric(self, epsilon: float) -> float:
        """Bound the add direction by the mean of the logarithms."""
        bins = self.bins
        square, spread = bins.own + bins.shared, bins.own / bins.bins + bins.shared
        return inequality_of_means(epsilon, square, spread)


def inequality_of_means(epsilon: float, square: float, spread: float) -> float:
    """Bound the add direction: L is at least e^Y, Y the mean of the logarithms.

    Args:
        epsilon: its delta is bounded.
        square: mean squared length of a mean, so that E Y = -square / 2.
        spread: mean product of two means, the variance of Y.
    """
    half, root = square / 2, math.sqrt(spread)
    d = (half - epsilon) / root
    # E (1 - e^(eps + Y))_+; what is subtracted is known to a part of 1e-12.
    below = math.exp(epsilon - half + root**2 / 2 + float(log_ndtr(d - root)))
    return float(ndtr(d)) * (1 + 1e-12) - below * (1 - 1e-12)


def _normal(ratio: Array, shared: float) -> tuple[Array, float]:
    """Return log(ratio) and half the variance, over the deviation."""
    root = math.sqrt(shared)
    with np.errstate(divide="ignore"):
        return np.log(ratio) / root, root / 2


def _masses(own: float, h: float, top: int) -> Array:
    """Return the law of X, cut at top h, each value shared out between its neighbours."""
    root = math.sqrt(own)
    ends = (np.log(h * np.arange(1.0, top + 1.0)) + own / 2) / root
    high = min(float(ends[-1]), HIGHEST)
    even = np.linspace(LOWEST, high, math.ceil((high - LOWEST) / PIECE) + 1)
    z = np.unique(np.concatenate([even, ends[(ends > LOWEST) & (ends < high)]]))
    half = np.diff(z)[:, None] / 2
    middle = z[:-1, None] + half
    nodes = middle + half * NODES
    density = np.exp(-np.square(nodes) / 2) * half * WEIGHTS / math.sqrt(2 * math.pi)
    cell = np.floor(np.exp(root * middle[:, 0] - own / 2) / h).astype(np.int64)
    cell = np.clip(cell, 0, top - 1)
    share = np.clip(np.exp(root * nodes - own / 2) / h - cell[:, None], 0.0, 1.0)
    masses: Array = np.zeros(top + 1)
    masses[:-1] += np.bincount(cell, (density * (1 - share)).sum(axis=1), top)
    masses[1:] += np.bincount(cell, (density * share).sum(axis=1), top)
    masses[top] += ndtr(-high)
    masses[:2] += ndtr(LOWEST)
    return masses


def _beyond(masses: Array, h: float, b: int, window: float) -> float:
    """Bound the probability of a sum of at least `window`, under P and Q, by Chernoff."""
    used = np.flatnonzero(masses)
    logs, x = np.log(masses[used]), h * used.astype(np.float64)
    best = 0.0
    for t in CHERNOFF:
        tilted = logs + t / window * x
        peak = float(tilted.max())
        e = np.exp(tilted - peak)
        plain, biased = peak + math.log(float(e.sum())), peak + math.log(float(e @ x))
        best = min(best, (b - 1) * plain + max(plain, biased) - t)
    return math.exp(best) * (1 + 1e-6)


def _powers(p: Array, biased: Array, b: int, size: int) -> tuple[Array, Array, float]:
    """Return p^{*b}, biased * p^{*(b - 1)}, and a bound on the error of either in l2."""
    eta = ETA * UNIT * math.log2(size)
    one, other = rfft(p, size), rfft(biased, size)
    d, e = (1.01 * eta * float(x.sum()) for x in (p, biased))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        logs = np.log(one)
        power = np.where(one == 0, 0.0, np.exp((b - 1) * logs)) if b > 1 else np.ones_like(one)
        # The logarithm, product and exponential, relative to the power; and the error d of `one`.
        own = np.where(one == 0, 0.0, np.abs(power) * (np.abs(logs) + 2))
        lost = (b - 1) * d * (np.abs(one) + d) ** max(b - 2, 0) + 4 * UNIT * b * own
    laws, norms = [], []
    for factor, part in ((one, d), (other, e)):
        found = power * factor
        off = lost * (np.abs(factor) + part) + np.abs(power) * part
        norms.append(np.linalg.norm(off + (eta + 4 * UNIT) * np.abs(found)))
        laws.append(np.maximum(irfft(found, size), 0.0))
    # The other half of the frequencies is conjugate.
    return laws[0], laws[1], math.sqrt(2 / size) * float(max(norms)) * 1.01


def _crossing(f: Callable[[float], float], delta: float) -> tuple[float, float]:
    """Return, close together, where f is above delta, or 0, and where it is not, or infinity."""
    if f(0.0) <= delta:
        return 0.0, 0.0
    low, high = 0.0, 0.5
    while f(high) > delta:
        low, high = high, 2 * high
        if high > HOPELESS:
            return low, math.inf

    def excess(epsilon: float) -> float:
        return math.log(max(f(epsilon), 1e-300) / delta)

    root = float(brentq(excess, low, high, xtol=1e-9, rtol=1e-6))
    step, above = 1e-6 * root, root
    while f(above) > delta:
        above, step = above + step, 2 * step
    step, below = 1e-6 * root, root
    while below > low and f(below) <= delta:
        below, step = max(low, below - step), 2 * step
    return below, above
