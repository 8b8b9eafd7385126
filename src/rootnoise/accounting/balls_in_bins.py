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
from rootnoise.accounting.monte_carlo import LARGEST, Mixture, Samples, Tilt
from rootnoise.causal import CausalMatrix

# Entries of arrays that are computed at a time, which stay in a cache: 0.5 MB.
CACHED = 2**16
# Samples of a block: their numbers take 1 MB.
BLOCK = 2**15
# Bins up to which all triples are summed, 0.06 s for each power: with 1000 bins 3 % less noise.
TRIPLES = 1024
# Means whose noise is made in one product, of what they have in common.
WIDTH = 64


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
        self.mean_norm2 = float(gram.mean())
        self.mean_square = float(np.diag(gram).mean())
        self.block = BLOCK
        self.orders = (1, 2, 3) if len(gram) <= TRIPLES else (1, 2)
        self._factor = list(_factor(gram))
        self._last: tuple[Tilt, Array, Array, Array] | None = None

    def tilt(self, order: int, power: float) -> Tilt | None:
        """Return the tilt of so many patterns at a time."""
        if (order * power) ** 2 * self.gram.max() > LARGEST:
            return None
        return Tilt(order, power, self._log_scale(order, power))

    def remove(
        self, rng: np.random.Generator, size: int, tilt: Tilt, *others: Tilt
    ) -> tuple[Array, ...]:
        """Return log L and log dR/dQ of samples from the tilted R, then log dR'/dQ of others."""
        drawn, half = self._patterns(rng, size, tilt), np.diag(self.gram) / 2
        tilted = tilt.power * self.gram
        powers = {t.power: np.empty(size) for t in (Tilt(1, 1.0, 0.0), tilt, *others)}
        for part in self._parts(size):
            columns = [column[part] for column in drawn]
            x = self._noise(rng, len(columns[0]))
            if tilt.order == 3:
                columns.append(self._third(rng, *columns))
            for column in columns:
                x += tilted[column]
            x -= half
            for power, sums in powers.items():
                sums[part] = _log_mean_exp(x if power == 1 else power * x)
        return powers[1.0], *(t.order * powers[t.power] - t.log_scale for t in (tilt, *others))

    def add(self, rng: np.random.Generator, size: int, tau: float) -> Samples:
        """Return log L and log dR/dQ of samples from N(-tau m, 1)."""
        half, mean = np.diag(self.gram) / 2, tau * self.gram.mean(axis=1)
        log_l, inner = np.empty(size), np.empty(size)
        for part in self._parts(size):
            u = self._noise(rng, len(log_l[part]))
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
        z = rng.standard_normal((size, len(self.gram)))
        noise = np.empty_like(z)
        for rows, columns, block in self._factor:
            np.matmul(z[:, columns], block, out=noise[:, rows])
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
        """Draw the first two patterns of each sample, in proportion to all weights together."""
        b = len(self.gram)
        if self._last is None or self._last[0] != tilt:
            sums = np.cumsum(self._joint(tilt.order, tilt.power))
            # Of one pattern alone, with hardly any noise, factors of pairs would overflow.
            weights = self._weights(tilt.power) if tilt.order == 3 else (sums, sums)
            self._last = tilt, sums, *weights
        sums = self._last[1]
        flat = np.searchsorted(sums, sums[-1] * rng.random(size), side="right")
        flat = np.minimum(flat, sums.size - 1)
        return [flat] if tilt.order == 1 else list(np.divmod(flat, b))

    def _third(
        self, rng: np.random.Generator, first: NDArray[np.int64], second: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Draw the third pattern of samples of the last tilt, given their first two."""
        assert self._last is not None  # noqa: S101 - `_patterns` has drawn these
        _, _, alone, pair = self._last
        last = pair[first]
        last *= pair[second]
        last *= alone
        np.cumsum(last, axis=1, out=last)
        third = (last < last[:, -1:] * rng.random((len(first), 1))).sum(axis=1)
        result: NDArray[np.int64] = np.minimum(third, len(self.gram) - 1)
        return result


def _factor(gram: Array) -> Iterator[tuple[slice, slice, Array]]:
    """Yield F, F F^T = gram, as products: rows of F, columns where they are not 0, that block^T.

    Means that are orthogonal but to their neighbours have a factor with few columns in a row: 24
    bands in 500 bins take a third of the time of all products.
    """
    try:
        factor = np.linalg.cholesky(gram)
    except np.linalg.LinAlgError:  # not of full rank, or not but for rounding
        values, vectors = np.linalg.eigh(gram)
        factor = vectors * np.sqrt(np.maximum(values, 0.0))
    for start in range(0, len(gram), WIDTH):
        rows = slice(start, min(start + WIDTH, len(gram)))
        used = np.flatnonzero(factor[rows].any(axis=0))
        columns = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)
        yield rows, columns, np.ascontiguousarray(factor[rows, columns].T)


def _log_mean_exp(x: Array) -> Array:
    top = x.max(axis=1)
    result: Array = top + np.log(np.exp(x - top[:, None]).mean(axis=1))
    return result
