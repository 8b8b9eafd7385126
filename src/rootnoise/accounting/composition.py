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

* transforms. Every output is a sum of inputs times roots of unity, each off by at most a relative
  eta log2 N, eta = mu + gamma_4 (sqrt 2 + mu) (Higham 2002, proof of Theorem 24.2), so that F r is
  off by less than d = eta log2(N) |r|_1 pointwise, its n-th power by n d (|F r| + d)^(n - 1) and by
  its own rounding, and the inverse adds eta log2(N) |(F r)^n|_2 in l2 (Theorem 24.2). All of it is
  summed as computed, and by Cauchy and Schwarz the sum errs by |g|_2 times that;
* a window. The transform is cyclic: mass outside its window is added somewhere inside. That only
  adds, but may take away from where the mass was, at most the mass itself, as g <= 1. Chernoff's
  inequality holds it below 2 TAIL.

The relative error of e^(theta s - kappa) in r is paid for by a factor e^(n u ...).
docs/accounting.md has the derivation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.fft import irfft, rfft
from scipy.optimize import minimize_scalar

from rootnoise._check import Array

UNIT = 2.0**-53
# eta in units of u: 1 + 4 sqrt 2 = 6.7 for twiddle factors right to u.
ETA = 8.0
# Mass of the tilted distribution that each side of the window may leave outside.
TAIL = 1e-14
# Points of the longest transform: 0.25 GB and 2 s.
LONGEST = 2**22
# Chernoff's inequality is tried at these numbers, each divided by the standard deviation.
CHERNOFF = tuple(np.geomspace(0.5, 500.0, 12).tolist())
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
        excess: by how much the true losses may be higher.
    """

    width: float
    first: int
    masses: Array
    infinity: float
    excess: float = 0.0

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
        found = tilted.epsilon(self.width, delta - lost)
        if math.isinf(found):  # every tilt gives a bound; half as much needs a shorter window
            found = tilted.half().epsilon(self.width, delta - lost)
        return found + rounds * self.excess


@dataclass(frozen=True, eq=False)
class _Tilted:
    """A loss distribution under a tilt: r(s) = p(s) e^(theta s - kappa)."""

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

    def half(self) -> _Tilted:
        """Return the same losses with half the tilt."""
        theta = self.theta / 2
        kappa = _kappa(self.losses, self.log_masses, theta)
        return _Tilted(self.losses, self.log_masses, self.rounds, theta, kappa)

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
        for t in CHERNOFF:
            up = n * (_kappa(self.losses, self.log_masses, theta + t / slope) - self.kappa)
            down = n * (_kappa(self.losses, self.log_masses, theta - t / slope) - self.kappa)
            reach = slope / (t * width)
            high = min(high, math.ceil((up - math.log(TAIL)) * reach) + 1)
            low = max(low, math.floor((math.log(TAIL) - down) * reach) - 1)
        size = 2 ** max(4, math.ceil(math.log2(high - low + 1)))
        if size > LONGEST:
            return math.inf
        folded: Array = np.zeros(size)
        np.add.at(folded, (cells - cells[0]) % size, r)
        found, error = _power(folded, n)
        # Cell low is at place low - n cells[0] of the cycle.
        found = np.roll(found, -((low - n * int(cells[0])) % size))
        largest = float(np.abs(exponents).max() + np.abs(self.log_masses).max() + abs(self.kappa))
        paid = n * UNIT * (2 * largest + span / size + 8)
        if not paid <= 1:
            return math.inf
        places = width * (low + np.arange(size, dtype=np.float64))
        reached = math.ceil(40 / theta / width) + 1  # beyond it g <= e^-40 < TAIL
        apart = 4 * UNIT * float(np.abs(places).max())  # of places - epsilon

        def log_delta(epsilon: float) -> float:
            start = max(0, math.floor(epsilon / width) - low)
            x = np.maximum(places[start : start + reached] - epsilon, 0.0)
            g = -np.expm1(-x) * np.exp(-theta * x)
            bulk = float(g @ found[start : start + reached])
            # |g|_2 of the whole grid: the sum of its squares is at most the integral and a peak.
            square = 2 / ((2 * theta) * (2 * theta + 1) * (2 * theta + 2)) / width + 1
            total = bulk + math.sqrt(square) * error + 3 * TAIL + apart
            return float(n * self.kappa - theta * epsilon + math.log(total) + paid + 1e-8)

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


def _power(r: Array, n: int) -> tuple[Array, float]:
    """Return the cyclic n-fold convolution of r >= 0 and a bound on its error in l2."""
    size = r.size
    transform = rfft(r)
    eta = ETA * UNIT * math.log2(size)
    d = 1.01 * eta * float(r.sum())
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        logs = np.log(transform)
        power = np.where(transform == 0, 0.0, np.exp(n * logs))
        # n log z: the logarithm, the product and the exponential, relative to the power.
        own = np.where(transform == 0, 0.0, np.abs(power) * (np.abs(logs) + 2))
        lost = np.exp((n - 1) * np.log(np.abs(transform) + d))
    errors = n * d * lost + 4 * UNIT * n * own + eta * np.abs(power)
    # The other half of the frequencies is conjugate.
    error = math.sqrt(2 / size) * float(np.linalg.norm(errors)) * 1.01
    return np.maximum(irfft(power, size), 0.0), error


def _kappa(losses: Array, log_masses: Array, theta: float) -> float:
    exponents = log_masses + theta * losses
    top = float(exponents.max())
    return top + math.log(float(np.exp(exponents - top).sum()))
