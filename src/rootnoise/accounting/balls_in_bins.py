"""Balls in bins: one of b patterns, i, i + b, i + 2b, ..., with probability 1 / b each.

Choquette-Choo, Ganesh, Haque, Steinke & Thakurta (2024), "Near exact privacy amplification for
matrix mechanisms", Lemma 3.2: only the Gram matrix of the b means matters.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from rootnoise._check import Array
from rootnoise.accounting.dominating import magnitudes
from rootnoise.accounting.monte_carlo import LARGEST, POWERS, Mixture, Samples, Tilt
from rootnoise.causal import CausalMatrix

# Entries of the largest array of a block, 32 MB.
BLOCK = 2**22
# And of those that are computed at a time, which stay in a cache: 0.5 MB.
CACHED = 2**16
# Bins up to which all triples are summed: 0.3 s for each power.
TRIPLES = 512


def bin_gram(strategy: CausalMatrix, bins: int, *, signed: bool = False) -> Array:
    """Return <m_i, m_j> of the means m_i = sum_j |C|[:, jb + i], before division by the noise.

    `signed` takes C itself: the means of a person whose gradients are all the same.
    """
    n = strategy.n_steps
    comb = np.zeros((n, bins))
    comb[np.arange(n), np.arange(n) % bins] = 1.0
    means = (strategy if signed else magnitudes(strategy)).apply(comb)
    gram: Array = means.T @ means
    return gram


class Bins(Mixture):
    """The mixture of b equally likely means, given by their Gram matrix in units of the noise."""

    def __init__(self, gram: Array) -> None:
        self.gram = gram
        b = len(gram)
        self.mean_norm2 = float(gram.mean())
        self.mean_square = float(np.diag(gram).mean())
        self.block = max(1, BLOCK // b)
        values, vectors = np.linalg.eigh(gram)
        self._root = vectors * np.sqrt(np.maximum(values, 0.0))
        self._last: tuple[Tilt, Array] | None = None

    def tilts(self) -> list[Tilt]:
        """Return those of 1 and 2 patterns at a time, and of 3 where that takes seconds."""
        found = [Tilt(1, 1.0, 0.0)]
        for power in POWERS:
            for order in (1, 2, 3) if len(self.gram) <= TRIPLES else (1, 2):
                if (order * power) ** 2 * self.gram.max() <= LARGEST:
                    found.append(Tilt(order, power, self._log_scale(order, power)))
        return found

    def remove(self, rng: np.random.Generator, size: int, tilt: Tilt) -> Samples:
        """Return log L and log dR/dQ of samples from the tilted R."""
        drawn = self._patterns(rng, size, tilt)
        log_x, half = self._noise(rng, size), np.diag(self.gram) / 2
        log_l, power = np.empty(size), np.empty(size)
        for part in self._parts(size):
            x = log_x[part]
            x += tilt.power * sum(self.gram[column[part]] for column in drawn)
            x -= half
            log_l[part] = _log_mean_exp(x)
            power[part] = log_l[part] if tilt.power == 1 else _log_mean_exp(tilt.power * x)
        return log_l, tilt.order * power - tilt.log_scale

    def add(self, rng: np.random.Generator, size: int, tau: float) -> Samples:
        """Return log L and log dR/dQ of samples from N(-tau m, 1)."""
        noise, half = self._noise(rng, size), np.diag(self.gram) / 2
        mean, log_l, inner = tau * self.gram.mean(axis=1), np.empty(size), np.empty(size)
        for part in self._parts(size):
            u = noise[part]
            u -= mean
            inner[part] = u.mean(axis=1)
            u -= half
            log_l[part] = _log_mean_exp(u)
        return log_l, -tau * inner - tau**2 * self.mean_norm2 / 2

    def _parts(self, size: int) -> Iterator[slice]:
        """Yield slices of samples whose entries stay in a cache."""
        rows = max(1, CACHED // len(self.gram))
        return (slice(start, start + rows) for start in range(0, size, rows))

    def _noise(self, rng: np.random.Generator, size: int) -> Array:
        """Return <m_i, z> for all i, z standard normal."""
        noise: Array = rng.standard_normal((size, len(self.gram))) @ self._root.T
        return noise

    def _alone(self, power: float) -> Array:
        """Return the factor of each pattern alone."""
        alone: Array = np.exp((power**2 - power) / 2 * np.diag(self.gram)) / len(self.gram)
        return alone

    def _weights(self, power: float) -> tuple[Array, Array]:
        """Return the factor of a pattern alone, and those of two patterns together."""
        return self._alone(power), np.exp(power**2 * self.gram)

    def _joint(self, order: int, power: float) -> Array:
        """Return the weights of the first pattern, or of the first two where there are more."""
        if order == 1:
            return self._alone(power)
        alone, pair = self._weights(power)
        both = alone[:, None] * alone * pair
        return both if order == 2 else both * ((pair * alone) @ pair)

    def _log_scale(self, order: int, power: float) -> float:
        return float(np.log(self._joint(order, power).sum()))

    def _patterns(self, rng: np.random.Generator, size: int, tilt: Tilt) -> list[NDArray[np.int64]]:
        """Draw the patterns of each sample, in proportion to their weights together."""
        b = len(self.gram)
        if self._last is None or self._last[0] != tilt:
            self._last = tilt, np.cumsum(self._joint(tilt.order, tilt.power))
        sums = self._last[1]
        flat = np.searchsorted(sums, sums[-1] * rng.random(size), side="right")
        flat = np.minimum(flat, sums.size - 1)
        if tilt.order == 1:
            return [flat]
        first, second = np.divmod(flat, b)
        if tilt.order == 2:
            return [first, second]
        alone, pair = self._weights(tilt.power)
        last = np.cumsum(alone * pair[first] * pair[second], axis=1)
        third = (last < last[:, -1:] * rng.random((size, 1))).sum(axis=1)
        return [first, second, np.minimum(third, b - 1)]


def _log_mean_exp(x: Array) -> Array:
    top = x.max(axis=1)
    result: Array = top + np.log(np.exp(x - top[:, None]).mean(axis=1))
    return result
