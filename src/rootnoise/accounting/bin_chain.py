"""The mean of log-normals whose logarithms take from a Markov chain, from both sides; no sampling.

Let Z_0, Z_1, ... be a stationary Gaussian chain, Cov(Z_i, Z_j) = decay^|i - j|, and block j of q
means have the logarithms

    x_{j, u} + n_{j, u} - v_u / 2,   x_{j, u} = heads_u Z_j + tails_u Z_{j + 1},   u < q,

with independent normals n of variance alone_u, and v_u the variance of x + n. Where decay is 0,
means are correlated in one block and with the next one, and no further. L is the mean of their
exponentials, and of `still` ones; `bin_series` gives E (k - L)_+ from E e^{i w S}, a product of
matrices.

A lattice. Round every normal at random to a lattice of width h. Quadratic splines keep chances, and
the means of all e^{a y} but for a part (a h / 2 pi)^3: that hides less (Jensen), as if variances
were larger by h^2 / 4. Gaussian kernels of variance t = SPREAD h^2 keep, but for a theta function
within THETA of 1, chances and the means of the e^{a x} given y: what is rounded so hides more, as
if variances were smaller by t. Chains so rounded have as many states as the lattice has points.
docs/accounting.md has the proofs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter
from scipy.sparse import csr_array

from rootnoise._check import Array
from rootnoise.accounting.bin_series import Complexes, Law
from rootnoise.accounting.composition import UNIT
from rootnoise.accounting.random_allocation import inequality_of_means

# t / h^2 of the lattice, and what the theta function may be off by: 2 e^{-11.8}, and all else.
SPREAD = 0.6
THETA = 2.001 * math.exp(-2 * math.pi**2 * SPREAD)
# Least variance over h^2 of a discrete normal: its masses and moments are then exact to 4e-19.
LEAST = 2.2
# The width of the lattice of x, and of x + n, over the deviation of x + n. Where x takes from two
# Z, each pair of states has a factor of its own, and a fine lattice costs its square.
WIDTH, PAIRS, FINE = 0.05, 0.05, 0.03
# All are so many times as coarse in a first look.
COARSE = 2.5
# Part of delta that paths off the lattice may cost.
SPARE = 1e-4
# Positions on the lattice are known to this part.
RELATIVE = 1e-13
# The vectors of one frequency are those of the next but for a factor and this, in l1.
STEADY = 1e-14
# Points that x is interpolated between, over the deviation of n.
STEP = 0.02
# Matrices of one frequency each that are held at once: 16 MB of them.
ENTRIES = 2**20

# What a mean takes of its block's Z and of the next, and what is left of its squared length.
Load = tuple[float, float, float]

NODES, WEIGHTS = np.polynomial.legendre.leggauss(10)


@dataclass(frozen=True)
class Chain:
    """One of b means is drawn, correlated through a Markov chain, in units of the noise.

    Attributes:
        bins: b >= 1.
        heads: what the q means of a block take of its Z.
        tails: what they take of the next block's Z, as many.
        alone: what is left of their squared lengths.
        decay: correlation of one Z with the next, in [0, 1).
        still: how many of the b are of length 0.
    """

    bins: int
    heads: tuple[float, ...]
    tails: tuple[float, ...]
    alone: tuple[float, ...]
    decay: float
    still: int = 0

    @classmethod
    def plain(
        cls, bins: int, linked: float, decay: float, alone: float = 0.0, still: int = 0
    ) -> Chain:
        """Return the chain of means whose products at distance d > 0 are linked decay^d."""
        return cls(bins, (math.sqrt(linked),), (0.0,), (alone,), decay, still)

    def upper(self, delta: float, start: float, coarse: float = 1.0) -> float:
        """Return an upper bound on epsilon; infinite where it is above `start`, another one.

        >>> chain = Chain.plain(bins=100, linked=0.5, decay=0.6, alone=0.5)
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
        law = self.law(math.exp(start), delta, coarse, above=True)
        root = _least(law.remove, target, 0.0, start)
        if math.isinf(root) or self._geometric(root) <= target:
            return root + shift
        for finer in (COARSE, coarse):  # seldom the larger one: a coarse look will do
            law = self.law(math.exp(-root), delta, finer, above=True)
            if law.add(root) <= target:
                return root + shift
        return _least(law.add, target, root, start) + shift

    def lower(self, delta: float, stop: float, coarse: float = 1.0) -> float:
        """Return a lower bound on epsilon, from the remove direction, given an upper one."""
        first = self._lower(delta, stop, COARSE)
        if coarse >= COARSE:
            return first
        near = min(stop, 1.06 * first + 0.03)  # what is smoothed is in proportion to e^near
        found = max(first, self._lower(delta, near, coarse))
        return found if found < 0.99 * near else max(found, self._lower(delta, stop, coarse))

    def _lower(self, delta: float, stop: float, coarse: float) -> float:
        shift = self._shift(coarse, above=False)
        rounded = self.bins + -(-self.bins // len(self.heads)) + 1
        target = delta * math.exp(shift) * (1 + THETA) ** rounded
        law = self.law(math.exp(stop), delta, coarse, above=False)
        low = high = stop
        while not law.remove(low) > target:  # nor where it is no number
            low, high = 0.96 * low, low
            if low < 1e-4:
                return 0.0
        while high - low > 1e-5 * high:
            middle = (low + high) / 2
            if law.remove(middle) > target:
                low = middle
            else:
                high = middle
        return max(low - shift, 0.0)

    def law(self, most: float, delta: float, coarse: float = 1.0, *, above: bool) -> Law:
        """Return the law for puts of strikes up to `most`, upper or lower bounds on them."""
        reach = math.sqrt(2 * math.log(4 * self.bins * max(most, 1.0) / (SPARE * delta)))
        lattice = Lattice(self, reach, coarse, above=above)
        return Law.of(
            lattice,
            self.bins,
            self.still,
            most,
            delta,
            coarse,
            above=above,
            mean=self._mean(coarse) if above else 1.0,
            # Of start or step, and n: a normal is beyond with at most e^{-reach^2 / 2}.
            lost=(self.bins - self.still) * 4 * math.exp(-(reach**2) / 2),
        )

    def _load(self, u: int) -> Load:
        return self.heads[u], self.tails[u], self.alone[u]

    def _parts(self, u: int) -> tuple[float, float]:
        """Return what mean u of a block takes of the newest innovation, and of the one before."""
        return self.tails[u], self.heads[u] + self.decay * self.tails[u]

    def _shift(self, coarse: float, *, above: bool) -> float:
        """Return what rounding multiplies L by, at most, as a logarithm."""
        h, c, found = self._width(coarse), self.decay, []
        for u in range(len(self.heads)):
            (new, old), fine = self._parts(u), self._fine(u, coarse)
            if above:
                # Of e^{a y}: 2 zeta(3) (a h / 2 pi)^3 and (a h)^4 / 960.
                cubes = h**3 * (new**3 + old**3 / (1 - c**3)) + fine**3
                fourths = h**4 * (new**4 + old**4 / (1 - c**4)) + fine**4
                found.append(2.45 * cubes / (2 * math.pi) ** 3 + fourths / 960)
            else:
                found.append(2 * THETA * (h * (new + old / (1 - c)) + fine))
        return max(found) + RELATIVE

    def _mean(self, coarse: float) -> float:
        """Return E L on the lattice of upper bounds, from above."""
        h, moving, total = self._width(coarse), self.bins - self.still, float(self.still)
        for u in range(min(len(self.heads), moving)):
            new, old = self._parts(u)
            blocks = np.arange(float(-(-(moving - u) // len(self.heads))))
            falls = np.cumsum(_falls(old * self.decay**blocks * h / 2)) + _falls(new * h / 2)
            if self.alone[u] > 0:
                falls += _falls(self._fine(u, coarse) / 2)
            total += float(np.exp(-falls).sum())
        return total / self.bins

    def _own(self) -> float:
        """Return the largest squared length of a mean."""
        return max(
            a * a + c * c + 2 * self.decay * a * c + n
            for a, c, n in zip(self.heads, self.tails, self.alone, strict=True)
        )

    def _width(self, coarse: float) -> float:
        """Return the distance of points of the lattice of Z."""
        largest = max(*self.heads, *self.tails)
        # Each mean of a block has factors of its own, for m^2 pairs of states.
        plain = not any(self.tails)
        width = WIDTH if plain else PAIRS * min(2.5, math.sqrt(len(self.heads)))
        return min(
            width * coarse * math.sqrt(self._own()) / largest,
            math.sqrt((1 - self.decay**2) / (LEAST + 2 * SPREAD + 0.1)),
        )

    def _fine(self, u: int, coarse: float) -> float:
        """Return the distance of points of the lattice of x + n, for mean u of a block."""
        return min(FINE * coarse * math.sqrt(self._own()), math.sqrt(max(self.alone[u], 1e-6) / 4))

    def _geometric(self, epsilon: float) -> float:
        """Bound the add direction by the mean of the logarithms."""
        moving, q = self.bins - self.still, len(self.heads)
        i = np.arange(moving)
        heads, tails, alone = (np.array(x)[i % q] for x in (self.heads, self.tails, self.alone))
        takes = np.zeros(moving // q + 2)
        np.add.at(takes, i // q, heads)
        np.add.at(takes, i // q + 1, tails)
        # The sum of takes_j takes_k decay^|j - k|.
        sums = lfilter([1.0], [1.0, -self.decay], takes)
        spread = float((takes * (2 * sums - takes)).sum() + alone.sum()) / self.bins**2
        squares = heads**2 + tails**2 + 2 * self.decay * heads * tails + alone
        return inequality_of_means(epsilon, float(squares.sum()) / self.bins, spread)


class Lattice:
    """A chain of discrete normals, covered to `reach` deviations to both sides."""

    def __init__(self, chain: Chain, reach: float, coarse: float = 1.0, *, above: bool) -> None:
        h = chain._width(coarse)
        step = _discrete(1 - chain.decay**2, h, above=above)
        variance = step / (1 - chain.decay**2)
        far = math.ceil(reach * math.sqrt(variance) / h)
        z: Array = h * np.arange(-far, far + 1.0)
        self.chain = chain
        self.start = _masses(z, variance, h, above=above)
        self.steps = _masses(z - chain.decay * z[:, None], step, h, above=above)
        self.terms: dict[Load, _Term] = {}
        for u in range(min(len(chain.heads), chain.bins - chain.still)):
            load = chain._load(u)
            if load not in self.terms and _mirror(load) not in self.terms:
                fine = chain._fine(u, coarse)
                self.terms[load] = _Term.of(chain, load, z, variance, reach, fine, above=above)

    def transform(self, w: Complexes, top: float) -> tuple[float, Complexes]:
        """Return the error and E e^{i w S}, no term >= top, S the sum of those that are not 1."""
        moving, q = self.chain.bins - self.chain.still, len(self.chain.heads)
        full, rest = divmod(moving, q)
        wide = max(term.masses.shape[1] for term in self.terms.values())
        # Each step: products of m and of `wide` terms, exponentials, polynomials, and the phase,
        # w E l at most.
        each = 2 * (len(self.start) + q * (wide + 128)) + 4 * q * float(np.abs(w).max())
        found: Complexes = np.empty(len(w), dtype=np.complex128)
        steady = bool(np.all(w.imag == 0))
        entries = len(self.start) * (len(self.start) if any(self.chain.tails) else 1)
        size, most = max(1, ENTRIES // entries), 0.0
        for first in range(0, len(w), size):
            part = w[first : first + size]
            vectors, left = np.tile(self.start + 0j, (len(part), 1)), 0.0
            if full:
                vectors, left = self._many(vectors, self._block(part, top, q), full, steady=steady)
            if rest:
                vectors = self._step(vectors, self._block(part, top, rest))
            found[first : first + size] = vectors.sum(axis=1)
            most = max(most, left)
        return 1.01 * UNIT * each * (full + 1) + most, found

    def _many(
        self, vectors: Complexes, block: Complexes, times: int, *, steady: bool
    ) -> tuple[Complexes, float]:
        """Return rows after so many blocks, and the error of having left out some."""
        for done in range(times):
            after = self._step(vectors, block)
            if steady and done % 4 == 3:
                sums = vectors.sum(axis=1)
                alive = np.abs(sums) > 1e-200
                ratio = np.where(alive, after.sum(axis=1) / np.where(alive, sums, 1.0), 0.0)
                left = float(np.abs(after - ratio[:, None] * vectors).sum(axis=1).max())
                if left <= STEADY and float(np.abs(ratio).max()) <= 1 + 1e-12:
                    rest = times - done
                    return vectors * ratio[:, None] ** rest, 1.01 * rest * (left + 16 * UNIT)
            vectors = after
        return vectors, 0.0

    def _step(self, vectors: Complexes, block: Complexes) -> Complexes:
        """Return what a block, and the step to the next Z, make of rows."""
        if block.ndim == 2:
            return _times(vectors * block, self.steps)
        result: Complexes = np.matmul(vectors[:, None, :], block)[:, 0, :]
        return result

    def _block(self, w: Complexes, top: float, means: int) -> Complexes:
        """Return the product of the first means' factors, by frequency and Z; or steps times it."""
        known = {load: term.factors(w, top) for load, term in self.terms.items()}
        product = np.ones((1,) * (1 + len(next(iter(self.terms.values())).shape)), np.complex128)
        for u in range(means):
            load = self.chain._load(u)
            given = known[load] if load in known else known[_mirror(load)].transpose(0, 2, 1)
            product = product * given
        return product * self.steps if product.ndim == 3 else product


@dataclass(frozen=True, eq=False)
class _Term:
    """One mean's e^{x + n - v / 2}, given x, which a Z or two of them give.

    Attributes:
        values: on the lattice of x + n.
        first: the place in `values` of the first x + n, for each of some x.
        masses: of it and of those after it.
        mix: of the means given these x, those given the Z: polynomials between x; or all of them.
        shape: of the Z.
    """

    values: Array
    first: NDArray[np.int64]
    masses: Array
    mix: csr_array | None
    shape: tuple[int, ...]

    @classmethod
    def of(
        cls,
        chain: Chain,
        load: Load,
        z: Array,
        variance: float,
        reach: float,
        h: float,
        *,
        above: bool,
    ) -> _Term:
        head, tail, alone = load
        n = _discrete(alone, h, above=above)
        square = head * head + tail * tail + 2 * chain.decay * head * tail
        half = (square * variance + n) / 2
        x = head * z[:, None] + tail * z if any(chain.tails) else head * z
        points, mix = x.ravel(), None
        if n == 0:
            values, first, masses = points, np.arange(len(points)), np.ones((len(points), 1))
            return cls(np.exp(values - half), first, masses, mix, x.shape)
        if x.ndim == 2:
            points, mix = _between(points, STEP * math.sqrt(n))
        wide = math.ceil(reach * math.sqrt(n) / h)
        first = np.round(points / h).astype(np.int64) - wide
        values = h * np.arange(float(first[0]), first[-1] + 2 * wide + 1.0)
        away = h * (first[:, None] + np.arange(2 * wide + 1)) - points[:, None]
        masses = _masses(away, n, h, above=above)
        return cls(np.exp(values - half), first - first[0], masses, mix, x.shape)

    def factors(self, w: Complexes, top: float) -> Complexes:
        """Return E e^{i w l}, l < top, given x, in rows of frequencies."""
        waves = np.exp(1j * np.outer(self.values, w))
        waves[self.values >= top] = 0.0
        if self.masses.shape[1] == 1:
            found = waves
        else:
            real, width = waves.view(np.float64), self.masses.shape[1]
            given = np.empty((len(self.first), real.shape[1]))
            # Those at the same place, which neighbours mostly are, in one product.
            edges = np.append(np.flatnonzero(np.diff(self.first, prepend=-1)), len(self.first))
            for a, b in itertools.pairwise(edges.tolist()):
                k = int(self.first[a])
                given[a:b] = self.masses[a:b] @ real[k : k + width]
            found = (given if self.mix is None else self.mix @ given).view(np.complex128)
        return np.ascontiguousarray(found.T).reshape(len(w), *self.shape)


def _between(x: Array, h: float) -> tuple[Array, csr_array]:
    """Return points h apart, and the matrix that gives from values there those at x.

    It is the polynomial through 8 points, which errs by at most 43.1 / 8! h^8 of the eighth
    derivative: for the mean of g(x + n), |g| <= 1, n of variance h^2 / STEP^2, at most sqrt(8!)
    (STEP / h)^8. All in all by 0.22 STEP^8, below 64 * 2^-53.
    """
    at = x / h
    low = np.floor(at)
    points = h * np.arange(low.min() - 3, low.max() + 5)
    offsets = np.arange(-3.0, 5.0)
    t = (at - low)[:, None] - offsets
    weights = np.ones((len(x), 8))
    for j in range(8):
        for k in range(8):
            if k != j:
                weights[:, j] *= t[:, k] / (offsets[j] - offsets[k])
    columns = (low[:, None] - low.min() + 3 + offsets).astype(np.int64)
    rows = np.arange(0, 8 * len(x) + 1, 8)
    return points, csr_array((weights.ravel(), columns.ravel(), rows), (len(x), len(points)))


def _mirror(load: Load) -> Load:
    head, tail, alone = load
    return tail, head, alone


def _falls(z: Array | float) -> Array:
    """Return how far the log of (sinh z / z)^3 is below z^2 / 2, from below."""
    square = np.square(z)
    result: Array = 3 * (square**2 / 180 - square**3 / 2835)
    return result


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
