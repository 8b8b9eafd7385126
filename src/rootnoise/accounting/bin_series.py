"""Puts on a mean of positive terms, from both sides, by a Fourier series of its transform.

L = (S + still) / bins, S a sum of terms whose transform E e^{i w S}, over the paths on which no
term is >= top, somebody else computes. Under Q = N(0, 1) L is a likelihood ratio. With put(k) =
E (k - L)_+, and as E L = 1,

    remove: E (L - e^eps)_+ = put(e^eps) + 1 - e^eps,    add: E (1 - e^eps L)_+ = e^eps put(e^-eps).

A series of period W gives E (k - S - R)_+ for an independent normal R, whose deviation r cuts it
off. R only adds (Jensen), and at most r^2 times the density of S + R at k:

    (k - s)_+ <= E (k - s - R)_+ <= (k - s)_+ + r phi((k - s) / r).

Paths with a term >= k contribute nothing to a put and are left out. docs/accounting.md has the
proofs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rootnoise._check import Array
from rootnoise.accounting.composition import UNIT

# Deviation r of R over k - 1, and least and most of it over k.
SMOOTH, SMOOTHEST, ROUGHEST = 0.02, 3e-3, 1e-2
# The period over k, above and, the first that is wide enough, below; where k < 1.
ROOM, ROOMS, WIDE = 2.25, (2.25, 3.0, 4.0, 6.0, 9.0), 7.0
# R is within this many r of 0.
FAR = 9.0
# Part of delta that the end of the series, and sums beyond the period, may cost.
SPARE = 1e-3
# Exponents, over k, that Chernoff's inequality tries.
CHERNOFF = (1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0)

Complexes = NDArray[np.complex128]


class Transform(Protocol):
    """What gives E e^{i w S} over paths with no term >= top, and its error; w may be imaginary."""

    def transform(self, w: Complexes, top: float) -> tuple[float, Complexes]:
        """Return the error and the values."""


@dataclass(frozen=True, eq=False)
class Law:
    """The law of S + R, by its Fourier series, for puts up to some k.

    Attributes:
        bins: how many terms L is the mean of.
        still: how many of them are 1.
        above: whether puts are to be too large, or too small.
        mean: E L, from above or below.
        smooth: r.
        period: W.
        waves: w_j = 2 pi j / W.
        series: E e^{i w (S + R)} at these.
        error: of any of E e^{i w S}.
        lost: chance of a path that the transform leaves out, in upper bounds.
        beyond: chance of S + R outside the period, no term >= k, in lower bounds.
    """

    bins: int
    still: int
    above: bool
    mean: float
    smooth: float
    period: float
    waves: Array
    series: Complexes
    error: float
    lost: float
    beyond: float

    @classmethod
    def of(
        cls,
        sums: Transform,
        bins: int,
        still: int,
        most: float,
        delta: float,
        coarse: float = 1.0,
        *,
        above: bool,
        mean: float = 1.0,
        lost: float = 0.0,
    ) -> Law:
        """Return the law for puts of strikes up to `most`, upper or lower bounds on them."""
        moving = bins - still
        top = most * bins - still
        scale = max(top, float(moving))
        part = SMOOTH * (most - 1) / most if most > 1 else ROUGHEST
        r = min(max(part, SMOOTHEST), ROUGHEST) * coarse * scale
        # A sum beyond the period comes back as a small one, and its put counts: E L must fit in.
        room, beyond = (ROOM if most >= 1 else WIDE), 0.0
        if not above:
            room, beyond = _room(sums, top, scale, SPARE * delta / max(most, 1.0))
        period = room * scale + 2 * FAR * r
        last = math.ceil(_cut(delta / max(most, 1.0)) / r * period / 2 / math.pi)
        waves: Array = 2 * math.pi / period * np.arange(last + 1.0)
        error, found = sums.transform(waves.astype(np.complex128), top)
        series = found * np.exp(-np.square(r * waves) / 2)
        return cls(bins, still, above, mean, r, period, waves, series, error, lost, beyond + 1e-18)

    def put(self, strike: float) -> float:
        """Return a bound on E (strike - L)_+, on the side of `above`."""
        b, w = self.bins, self.waves[1:]
        k = strike * b - self.still
        if k <= 0:
            return 0.0
        # The integral of (k - s) e^{-i w s} from -a, a = FAR r, to k.
        u = k + FAR * self.smooth
        part = u * np.exp(1j * w * u) / (1j * w) + np.expm1(1j * w * u) / np.square(w)
        turned = np.exp(-1j * w * k)
        total = u * u / 2 * self.series[0].real
        total += 2 * float((turned * part * self.series[1:]).real.sum())
        sizes = np.abs(part)
        # E e^{i w S}, the terms, and what the series leaves out.
        damped = np.exp(-np.square(self.smooth * w) / 2)
        error = self.error * (u * u / 2 + 2 * float(sizes @ damped))
        # Its two parts are u / w and more, and nearly cancel where w u is small.
        parts = np.where(w * u < 2, sizes + 2 * u / w, sizes)
        known = np.abs(self.series[1:])
        error += UNIT * (float(((16 + 8 * w * u) * parts) @ known) + 16 * u * u)
        end = damped[-1] / -math.expm1(-self.smooth * w[-1] * self.smooth * w[0])
        error += 2 * (u / w[-1] + 2 / w[-1] ** 2) * end
        value, error = float(total) / (self.period * b), float(error) / (self.period * b)
        if self.above:
            return max(value, 0.0) + error + strike * self.lost + 1e-17 * (1 + strike)
        # r^2 times the density of S + R at k, from above.
        dense = float(self.series[0].real + 2 * (turned * self.series[1:]).real.sum())
        dense += self.error * (1 + 2 * float(damped.sum())) + 2 * float(end)
        dense += UNIT * float((16 + 8 * w * u) @ known)
        added = self.smooth**2 * max(dense, 0.0) / (self.period * b)
        return value - error - added - u / b * self.beyond

    def remove(self, epsilon: float) -> float:
        """Return a bound on E (L - e^eps)_+."""
        strike = math.exp(epsilon)
        sign = 1 if self.above else -1
        return self.put(strike) + (self.mean - strike) + sign * 4 * UNIT * strike

    def add(self, epsilon: float) -> float:
        """Return an upper bound on E (1 - e^eps L)_+."""
        return math.exp(epsilon) * self.put(math.exp(-epsilon)) * (1 + 8 * UNIT)


def _cut(delta: float) -> float:
    """Return r w where the series ends."""
    return math.sqrt(2 * math.log(1 / (SPARE * delta)))


def _room(sums: Transform, top: float, scale: float, chance: float) -> tuple[float, float]:
    """Return a period over k, and Chernoff's bound on the chance of a sum beyond it."""
    tilts = np.array(CHERNOFF)
    with np.errstate(all="ignore"):  # what is no number bounds nothing
        grown = np.log(sums.transform(-1j * tilts / scale, top)[1].real)
    for room in ROOMS:
        total = grown - room * tilts
        beyond = math.exp(min(0.0, float(np.nanmin(np.append(total, 0.0))))) * (1 + 1e-5)
        if beyond <= chance:
            break
    return room, beyond
