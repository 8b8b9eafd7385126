"""The mean of log-normals whose logarithms form a Markov chain, from both sides; no sampling.

Let x_0, x_1, ... be a stationary Gaussian chain, Cov(x_i, x_j) = linked decay^|i - j|, in runs that
are independent of each other, and n_i independent normals of variance `alone`. Under Q = N(0, 1)
the likelihood ratio of equally likely means with these products is the mean L of the l_i =
e^{x_i + n_i - (linked + alone) / 2}. With put(k) = E (k - L)_+, and as E L = 1,

    remove: E (L - e^eps)_+ = put(e^eps) + 1 - e^eps,    add: E (1 - e^eps L)_+ = e^eps put(e^-eps).

A lattice. Round every normal at random to a lattice of width h. Quadratic splines keep chances, and
the means of all e^{a y} but for a part (a h / 2 pi)^3: that hides less (Jensen), as if variances
were larger by h^2 / 4. Gaussian kernels of variance t = SPREAD h^2 keep, but for a theta function
within THETA of 1, chances and the means of the e^{a x} given y: what is rounded so hides more, as
if variances were smaller by t. Chains so rounded have as many states as the lattice has points.

A transform. E e^{i w S} of the sum S is then a product of matrices, and needs no grid for S: a
Fourier series of period W gives E (k - S - R)_+ for an independent normal R, whose deviation r cuts
the series off. R only adds (Jensen), and is paid for by a shift of k in lower bounds. Paths with an
l_i >= k contribute nothing to a put and are left out. docs/accounting.md has the proofs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rootnoise._check import Array
from rootnoise.accounting.composition import UNIT
from rootnoise.accounting.random_allocation import inequality_of_means

# t / h^2 of the lattice, and what the theta function may be off by: 2 e^{-11.8}, and all else.
SPREAD = 0.6
THETA = 2.001 * math.exp(-2 * math.pi**2 * SPREAD)
# Least variance over h^2 of a discrete normal: its masses and moments are then exact to 4e-19.
LEAST = 2.2
# The width of the lattice over the deviation of x + n.
WIDTH = 0.05
# Both are so many times as coarse in a first look.
COARSE = 2.5
# Deviation r of R over k: in upper bounds, in lower bounds.
SMOOTH = {True: 3e-3, False: 1e-3}
ROOM = {True: 2.25, False: 6.0}
# r w is at least this where the series ends, and R is within this many r of 0.
CUT, FAR = 8.0, 9.0
# Part of delta that paths off the lattice may cost.
SPARE = 1e-4
# Positions on the lattice are known to this part.
RELATIVE = 1e-13
# The vectors of one frequency are those of the next but for a factor and this, in l1.
STEADY = 1e-14
# Exponents, over k, that Chernoff's inequality tries.
CHERNOFF = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0)

NODES, WEIGHTS = np.polynomial.legendre.leggauss(10)

Complexes = NDArray[np.complex128]


@dataclass(frozen=True)
class Chain:
    """One of b means is drawn, correlated as in a Markov chain, in units of the noise.

    Attributes:
        bins: b >= 1.
        linked: product of a mean with its twin, were there one, in the chain.
        decay: by what products fall from one to the next, in (0, 1).
        alone: squared length of a mean, less `linked`.
        run: neighbours in a row that are correlated; from run to run means are orthogonal.
        still: how many of the b are of length 0.
    """

    bins: int
    linked: float
    decay: float
    alone: float
    run: int
    still: int = 0

    def upper(self, delta: float, start: float, coarse: float = 1.0) -> float:
        """Return an upper bound on epsilon; infinite where it is above `start`, another one.

        >>> chain = Chain(bins=100, linked=0.5, decay=0.6, alone=0.5, run=100)
        >>> round(chain.upper(1e-5, start=2.0), 2)
        0.75
        """
        first = self._upper(delta, start, COARSE)
        for _ in range(4):  # what is rounded may be too much there, and yet fit below
            if math.isfinite(first):
                break
            start *= 0.9
            first = self._upper(delta, start, COARSE)
        for _ in range(6):  # what is rounded is in proportion to e^start
            if first > 0.9 * start:
                break
            start = 1.05 * first + 0.02
            first = min(first, self._upper(delta, start, COARSE))
        if coarse >= COARSE:
            return first
        return min(first, self._upper(delta, min(start, 1.02 * first), coarse))

    def _upper(self, delta: float, start: float, coarse: float) -> float:
        shift = self._shift(max(coarse, COARSE), above=True)
        target = delta * math.exp(-shift)
        law = _Law.of(self, math.exp(start), delta, coarse, above=True)
        root = _least(law.remove, target, 0.0, start)
        if math.isinf(root) or self._geometric(root) <= target:
            return root + shift
        for finer in (COARSE, coarse):  # seldom the larger one: a coarse look will do
            law = _Law.of(self, math.exp(-root), delta, finer, above=True)
            if law.add(root) <= target:
                return root + shift
        return _least(law.add, target, root, start) + shift

    def lower(self, delta: float, stop: float, coarse: float = 1.0) -> float:
        """Return a lower bound on epsilon, from the remove direction, given an upper one."""
        shift = self._shift(coarse, above=False)
        target = delta * math.exp(shift) * (1 + THETA) ** (2 * self.bins)
        law = _Law.of(self, 1.01 * math.exp(stop), delta, coarse, above=False)
        root = _least(law.remove, target, 0.0, stop)
        root = stop if math.isinf(root) else root
        step = 1e-6
        while root > 0 and not law.remove(root) > target:
            root, step = max(root - step, 0.0), 2 * step
        return max(root - shift, 0.0)

    def _shift(self, coarse: float, *, above: bool) -> float:
        """Return what rounding multiplies L by, at most, as a logarithm."""
        h, c = self._width(coarse), self.decay
        if above:
            # Of e^{a y}: 2 zeta(3) (a h / 2 pi)^3 and (a h)^4 / 960.
            cubes, fourths = 1 / (1 - c**3) + 1, 1 / (1 - c**4) + 1
            return 2.45 * (h / 2 / math.pi) ** 3 * cubes + h**4 / 960 * fourths + RELATIVE
        return 2 * h * THETA * (1 / (1 - c) + 1) + RELATIVE

    def _mean(self, coarse: float) -> float:
        """Return E L on the lattice of upper bounds, from above."""
        # log E e^{a y} falls short of a^2 v / 2 by 3 (z^4 / 180 - z^6 / 2835 + ...), z = a h / 2.
        z = self._width(coarse) / 2 * self.decay ** np.arange(float(self.run))
        short = 3 * (z**4 / 180 - z**6 / 2835)
        alone = short[0] if self.alone > 0 else 0.0
        sums = np.append(0.0, np.cumsum(np.exp(-np.cumsum(short) - alone)))
        full, rest = divmod(self.bins - self.still, self.run)
        return float(full * sums[self.run] + sums[rest] + self.still) / self.bins

    def _width(self, coarse: float) -> float:
        """Return the distance of points of the lattice."""
        return min(
            WIDTH * coarse * math.sqrt(self.linked + self.alone),
            math.sqrt((1 - self.decay**2) * self.linked / (LEAST + 2 * SPREAD + 0.1)),
        )

    def _geometric(self, epsilon: float) -> float:
        """Bound the add direction by the mean of the logarithms."""
        if self.run < self.bins:
            return math.inf
        d = np.arange(1.0, self.run)
        pairs = float(np.sum(self.decay**d * (1 - d / self.run)))
        spread = (self.alone + self.linked * (1 + 2 * pairs)) / self.bins
        return inequality_of_means(epsilon, self.linked + self.alone, spread)


@dataclass(frozen=True, eq=False)
class _Lattice:
    """A chain of discrete normals.

    Attributes:
        start: masses of x_0.
        steps: from each x to the next.
        alone: masses of n.
        values: l at the least x + n, and so on.
        lost: chance that one path is not on it, a bin.
    """

    start: Array
    steps: Array
    alone: Array
    values: Array
    lost: float

    @classmethod
    def of(cls, chain: Chain, top: float, reach: float, coarse: float, *, above: bool) -> _Lattice:
        """Cover `reach` deviations to both sides, as far as some l is below `top`."""
        h = chain._width(coarse)
        step = _discrete((1 - chain.decay**2) * chain.linked, h, above=above)
        alone = _discrete(chain.alone, h, above=above)
        linked = step / (1 - chain.decay**2)
        half = (linked + alone) / 2
        far, wide = (math.ceil(reach * math.sqrt(v) / h) for v in (linked, alone))
        last = min(far, math.floor((math.log(top) + half) / h) + wide + 1)
        x = h * np.arange(-far, max(last, -far) + 1.0)
        values = np.exp(h * np.arange(-far - wide, max(last, -far) + wide + 1.0) - half)
        return cls(
            _masses(x, linked, h, above=above),
            _masses(x - chain.decay * x[:, None], step, h, above=above),
            _masses(h * np.arange(-wide, wide + 1.0), alone, h, above=above)
            if wide
            else np.ones(1),
            values,
            4 * math.exp(-(reach**2) / 2),
        )

    def transform(self, w: Complexes, top: float, lengths: list[int]) -> tuple[Array, Complexes]:
        """Return the errors and E e^{i w S}, no l >= top, of sums of some lengths, in order."""
        m, wide = len(self.start), len(self.alone)
        spread = np.zeros((len(self.values), m))
        for i in range(m):
            spread[i : i + wide, i] = self.alone
        kept = self.values < top
        factors = np.exp(1j * np.outer(w, self.values[kept])) @ spread[kept]
        found: Complexes = np.zeros((len(lengths), len(w)), dtype=np.complex128)
        # Each step: products of m and of `wide` terms, exponentials, and the phase, w E l at most.
        each = UNIT * (2 * (m + wide + 64) + 4 * float(np.abs(w).max()))
        errors = each * np.array(lengths, dtype=np.float64)
        steady = bool(np.all(w.imag == 0))
        vectors = (self.start * factors).astype(np.complex128)
        length = 1
        while True:
            for row in (j for j, wanted in enumerate(lengths) if wanted == length):
                found[row] = vectors.sum(axis=1)
            if length >= max(lengths):
                return errors, found
            after: Complexes = _times(vectors, self.steps) * factors
            if steady and length % 8 == 0:
                sums = vectors.sum(axis=1)
                alive = np.abs(sums) > 1e-200
                ratio = np.where(alive, after.sum(axis=1) / np.where(alive, sums, 1.0), 0.0)
                left = float(np.abs(after - ratio[:, None] * vectors).sum(axis=1).max())
                if left <= STEADY and float(np.abs(ratio).max()) <= 1 + 1e-12:
                    for row in (j for j, wanted in enumerate(lengths) if wanted > length):
                        found[row] = sums * ratio ** (lengths[row] - length)
                        errors[row] += 1.01 * (lengths[row] - length) * (left + 16 * UNIT)
                    return errors, found
            vectors = after
            length += 1


@dataclass(frozen=True, eq=False)
class _Law:
    """The law of S + R, by its Fourier series, for puts up to some k.

    Attributes:
        chain: what S is of.
        above: whether puts are to be too large, or too small.
        mean: E L, from above or below.
        smooth: r.
        period: W.
        waves: w_j = 2 pi j / W.
        series: E e^{i w (S + R)} at these.
        error: of any of E e^{i w S}.
        lost: chance of a path off the lattice.
        beyond: chance of S + R outside the period, no l >= k.
    """

    chain: Chain
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
    def of(cls, chain: Chain, most: float, delta: float, coarse: float, *, above: bool) -> _Law:
        """Return the law for puts of strikes up to `most`, upper or lower bounds on them."""
        moving = chain.bins - chain.still
        top = most * chain.bins - chain.still
        # A sum beyond the period comes back as a small one, and its put counts: E L must fit in.
        room, smooth = (ROOM[above], SMOOTH[above]) if most >= 1 else (7.0, 4 * SMOOTH[above])
        scale = max(top, float(moving))
        r = smooth * coarse * scale
        period = room * scale + 2 * FAR * r
        last = math.ceil(CUT / r * period / 2 / math.pi)
        waves: Array = 2 * math.pi / period * np.arange(last + 1.0)
        reach = math.sqrt(2 * math.log(4 * chain.bins * max(most, 1.0) / (SPARE * delta)))
        lattice = _Lattice.of(chain, top, reach, coarse, above=above)
        full, rest = divmod(moving, chain.run)
        lengths = [chain.run, rest] if rest else [chain.run]

        def whole(parts: Complexes) -> Complexes:
            power: Complexes = parts[0] ** full
            return power * parts[1] if rest else power

        errors, parts = lattice.transform(waves.astype(np.complex128), top, lengths)
        error = (full * errors[0] + (errors[1] if rest else 0.0) + 16 * full * UNIT) * 1.01
        beyond = 1e-18
        if not above:
            tilts = np.array(CHERNOFF)
            logs = np.log(lattice.transform(-1j * tilts / scale, top, lengths)[1].real)
            total = full * logs[0] + (logs[1] if rest else 0.0) - room * tilts
            beyond += math.exp(min(0.0, float(total.min()))) * (1 + 1e-6)
        series = whole(parts) * np.exp(-np.square(r * waves) / 2)
        lost = moving * lattice.lost
        mean = chain._mean(coarse) if above else 1.0
        return cls(chain, above, mean, r, period, waves, series, error, lost, beyond)

    def put(self, strike: float) -> float:
        """Return a bound on E (strike - L - R / b)_+, on the side of `above`."""
        b, w = self.chain.bins, self.waves[1:]
        k = strike * b - self.chain.still
        if k <= 0:
            return 0.0
        # The integral of (k - s) e^{-i w s} from -a, a = FAR r, to k.
        u = k + FAR * self.smooth
        part = u * np.exp(1j * w * u) / (1j * w) + np.expm1(1j * w * u) / np.square(w)
        terms = np.exp(-1j * w * k) * part
        total = u * u / 2 * self.series[0].real + 2 * float((terms * self.series[1:]).real.sum())
        sizes = np.abs(terms)
        # E e^{i w S}, the terms, and what the series leaves out.
        damped = np.exp(-np.square(self.smooth * w) / 2)
        error = self.error * (u * u / 2 + 2 * float(sizes @ damped))
        # Its two parts are u / w and more, and nearly cancel where w u is small.
        parts = np.where(w * u < 2, sizes + 2 * u / w, sizes)
        rounded = float(((16 + 8 * w * u) * parts) @ np.abs(self.series[1:]))
        error += UNIT * (rounded + 16 * u * u)
        gap = self.smooth * 2 * math.pi / self.period
        last = 2 * (u / w[-1] + 2 / w[-1] ** 2)
        error += last * math.exp(-(CUT**2) / 2) / (1 - math.exp(-CUT * gap))
        value, error = float(total) / (self.period * b), float(error) / (self.period * b)
        if self.above:
            return max(value, 0.0) + error + strike * self.lost + 1e-17 * (1 + strike)
        return value - error - u / b * self.beyond

    def remove(self, epsilon: float) -> float:
        """Return a bound on E (L - e^eps)_+."""
        strike = math.exp(epsilon)
        if self.above:
            return self.put(strike) + (self.mean - strike) + 4 * UNIT * strike
        # (L - K)_+ >= (L + R - t - K)_+ - (R - t)_+, t = 5 r.
        width = self.smooth / self.chain.bins
        moved = strike + 5 * width
        slipped = width * math.exp(-12.5) / math.sqrt(2 * math.pi) / 25
        return self.put(moved) + (self.mean - moved) - 4 * UNIT * moved - slipped

    def add(self, epsilon: float) -> float:
        """Return an upper bound on E (1 - e^eps L)_+."""
        return math.exp(epsilon) * self.put(math.exp(-epsilon)) * (1 + 8 * UNIT)


def _discrete(variance: float, h: float, *, above: bool) -> float:
    """Return the variance of the discrete normal that stands for a normal of `variance`, or 0."""
    if variance <= 0:
        return 0.0
    if above:
        return max(variance, LEAST * h * h) + h * h / 4
    t = SPREAD * h * h
    if variance < (LEAST + 2 * SPREAD) * h * h:
        return 0.0
    # g^2 v + t = g v: the kernel of the lattice of width h / g.
    return variance * (1 + math.sqrt(1 - 4 * t / variance)) / 2


def _masses(x: Array, variance: float, h: float, *, above: bool) -> Array:
    """Return h times the density at x; of a sum with the quadratic spline in upper bounds."""
    if not above:
        plain: Array = np.exp(-np.square(x) / (2 * variance))
        return plain * (h / math.sqrt(2 * math.pi * variance))
    v = variance - h * h / 4
    result: Array = np.zeros_like(x)
    for node, weight in zip(NODES, WEIGHTS, strict=True):
        for piece in (-1.0, 0.0, 1.0):
            z = piece + node / 2
            spline = 0.75 - z * z if piece == 0 else (1.5 - abs(z)) ** 2 / 2
            result += weight / 2 * spline * np.exp(-np.square(x - h * z) / (2 * v))
    return result * (h / math.sqrt(2 * math.pi * v))


def _times(vectors: Complexes, matrix: Array) -> Complexes:
    """Return the product of complex rows with a real matrix, as two real products in one."""
    n = len(vectors)
    both = np.concatenate([vectors.real, vectors.imag]) @ matrix
    result: Complexes = both[:n] + 1j * both[n:]
    return result


def _least(f: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Return a point in [low, high], close to the least, where f is at most the target; or inf."""
    if f(low) <= target:
        return low
    if not f(high) <= target:  # nor where it is no number
        return math.inf
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        if f(middle) <= target:
            high = middle
        else:
            low = middle
    return high
