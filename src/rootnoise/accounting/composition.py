"""The same privacy loss many times over: an upper bound on delta, rounding errors included.

A loss distribution p on a grid of width h, with mass p_inf at infinity, composed n times has

    delta(eps) = 1 - (1 - p_inf)^n + sum_{s > eps} (1 - e^(eps - s)) p^{*n}(s).

A Fourier transform computes p^{*n} with an error relative to its largest entries, which drowns the
tail where a small delta is decided. So p is tilted first, r(s) = p(s) e^(theta s - kappa), with
kappa = log sum_s p(s) e^(theta s), and theta such that eps is the mean of the composed r (Cramer
1938). As p^{*n}(s) = e^(n kappa - theta s) r^{*n}(s),

    sum_{s > eps} ... = e^(n kappa - theta eps) sum_{s > eps} g(s - eps) r^{*n}(s),
    g(x) = (1 - e^-x) e^(-theta x) in [0, 1],

where the sum is of order one, so that errors stay relative to delta itself. What is added to it:

* transforms. One of length N errs by at most c log2(N) u |x| in l2 (Higham 2002, Theorem 24.2).
  |F r| <= 1 pointwise, and so the n-th power of the computed transform is off by n times as much,
  and by n u (|arg| + |log|) of its own. Together |error of r^{*n}|_2 <= n u |r|_2 (ROUNDING
  log2(N) + ROUNDING), and by Cauchy and Schwarz the sum errs by |g|_2 times that;
* a window. The transform is cyclic: mass outside its window is added somewhere inside. That only
  adds, but may take away from where the mass was, at most the mass itself, as g <= 1. Chernoff's
  inequality holds it below 2 TAIL.

The relative error of e^(theta s - kappa) in r is paid for by a factor e^(n u ...). The masses p are
taken as they come.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft
from scipy.optimize import minimize_scalar

Array = NDArray[np.float64]

UNIT = 2.0**-53
# Higham's constant is below 7 for accurate twiddle factors; two transforms and a power.
ROUNDING = 32.0
# Mass of the tilted distribution that each side of the window may leave outside.
TAIL = 1e-14
# Points of the longest transform: 0.25 GB and 2 s.
LONGEST = 2**22
# Powers theta to choose from, as exponents of e.
LOG_POWERS = (-12.0, 12.0)


@dataclass(frozen=True)
class Losses:
    """A pessimistic privacy loss distribution of one step.

    Attributes:
        width: h of the grid.
        first: the loss of the first mass, in widths.
        masses: at first, first + 1, ...
        infinity: mass at infinite loss.
    """

    width: float
    first: int
    masses: Array
    infinity: float

    def epsilon(self, rounds: int, delta: float) -> float:
        """Return an upper bound on the epsilon of `rounds` of them; inf where none can be stated.

        >>> fair = Losses(0.5, -2, np.array([0.2689, 0, 0, 0, 0.7311]), 0.0)
        >>> round(fair.epsilon(1, 1e-9), 3), round(fair.epsilon(3, 1e-9), 3)
        (1.0, 3.0)
        """
        # 1 - (1 - p)^n, from above.
        lost = -math.expm1(rounds * math.log1p(-self.infinity)) * (1 + 1e-12)
        if lost >= delta * (1 - 1e-9):
            return math.inf
        used = self.masses > 0
        if not used.any():
            return 0.0
        losses = self.width * (self.first + np.flatnonzero(used)).astype(np.float64)
        tilted = _Tilted.at_delta(losses, self.masses[used], rounds, delta - lost)
        return tilted.epsilon(self.width, delta - lost)


@dataclass(frozen=True, eq=False)
class _Tilted:
    """r and what it stands for."""

    losses: Array
    log_masses: Array
    rounds: int
    theta: float
    kappa: float

    @classmethod
    def at_delta(cls, losses: Array, masses: Array, rounds: int, delta: float) -> _Tilted:
        """Tilt so that the Chernoff bound on epsilon at this delta is least."""
        logs = np.log(masses)

        def bound(log_theta: float) -> float:
            theta = math.exp(log_theta)
            peak = theta * math.log(theta) - (1 + theta) * math.log1p(theta)
            return (rounds * _kappa(losses, logs, theta) + peak - math.log(delta)) / theta

        best = minimize_scalar(bound, bounds=LOG_POWERS, method="bounded", options={"xatol": 1e-2})
        theta = math.exp(float(best.x))
        return cls(losses, logs, rounds, theta, _kappa(losses, logs, theta))

    def epsilon(self, width: float, delta: float) -> float:
        """Return where the bound on delta falls to `delta`, or inf."""
        n, theta = self.rounds, self.theta
        exponents = theta * self.losses
        r = np.exp(self.log_masses + exponents - self.kappa)
        mean = float(r @ self.losses)
        deviation = math.sqrt(n * float(r @ np.square(self.losses - mean)))
        cells = np.rint(self.losses / width).astype(np.int64)
        span = int(cells[-1] - cells[0])
        low, high = n * int(cells[0]), n * int(cells[-1])
        slope = max(deviation, width)
        for t in (2.0, 4.0, 6.0, 8.0, 10.0, 12.0):
            up = n * (_kappa(self.losses, self.log_masses, theta + t / slope) - self.kappa)
            down = n * (_kappa(self.losses, self.log_masses, theta - t / slope) - self.kappa)
            reach = slope / (t * width)
            high = min(high, math.ceil((up - math.log(TAIL)) * reach) + 1)
            low = max(low, math.floor((math.log(TAIL) - down) * reach) - 1)
        size = int(next_fast_len(max(high - low + 1, 16), real=True))
        if size > LONGEST:
            return math.inf
        folded = np.bincount((cells - cells[0]) % size, weights=r, minlength=size)
        with np.errstate(divide="ignore"):
            power = np.exp(n * np.log(rfft(folded)))
        found = np.maximum(irfft(power, size), 0.0)
        # Cell low is at place low - n cells[0] of the cycle.
        found = np.roll(found, -((low - n * int(cells[0])) % size))
        norm = math.sqrt(float(folded @ folded))
        error = n * UNIT * norm * ROUNDING * (math.log2(size) + 1)
        largest = float(np.abs(exponents).max() + np.abs(self.log_masses).max() + abs(self.kappa))
        paid = n * UNIT * (largest + math.log2(span + 2) + 8) + max(0.0, n * math.log(r.sum()))
        if paid > 1:
            return math.inf
        places = width * (low + np.arange(size, dtype=np.float64))

        def log_delta(epsilon: float) -> float:
            start = max(0, math.floor(epsilon / width) - low)
            x = places[start:] - epsilon
            x = np.maximum(x, 0.0)
            g = -np.expm1(-x) * np.exp(-theta * x)
            bulk = float(g @ found[start:])
            # |g|_2 of the whole grid: the sum of its squares is at most the integral and a peak.
            square = 2 / ((2 * theta) * (2 * theta + 1) * (2 * theta + 2)) / width + 1
            total = bulk + math.sqrt(square) * error + 2 * TAIL
            return n * self.kappa - theta * epsilon + math.log(total) + paid + 1e-9

        goal = math.log(delta)
        if log_delta(0.0) <= goal:
            return 0.0
        below, above = 0.0, max(n * mean, width)
        while log_delta(above) > goal:
            below, above = above, above * 2 + deviation
            if above > 1e12:
                return math.inf
        while above - below > 1e-7 * above:
            middle = (above + below) / 2
            below, above = (middle, above) if log_delta(middle) > goal else (below, middle)
        return above


def _kappa(losses: Array, log_masses: Array, theta: float) -> float:
    exponents = log_masses + theta * losses
    top = float(exponents.max())
    return top + math.log(float(np.exp(exponents - top).sum()))
