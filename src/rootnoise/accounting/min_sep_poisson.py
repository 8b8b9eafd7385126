"""b-min-sep Poisson: who has sat out b - 1 steps joins the next with probability p, independently.

Dong & Ganesh (2026), "Privacy amplification for BandMF via b-min-sep subsampling". The strategy
has at most b bands, so that the columns of one person do not overlap, and the likelihood ratio
L = sum_pi w_pi x_pi is a product over the steps of pi. It follows backwards, from f_i = 1, i >= n:

    f_i = (1 - p) f_{i+1} + p x_i f_{i+b},   log x_i = <c_i, y> - |c_i|^2 / 2,

where f_i is the ratio of steps i, i + 1, ... for one who may join at step i. The run starts warm,
as if it had gone on forever: one may join at once with probability 1 / (1 + (b - 1) p), and not
before step i = 1, ..., b - 1 with probability p / (1 + (b - 1) p) each, so that

    L = (f_0 + p (f_1 + ... + f_{b-1})) / (1 + (b - 1) p),

and everybody joins every step with the same probability p_0 = p / (1 + (b - 1) p).
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from rootnoise._check import Array
from rootnoise.accounting import min_sep_patterns
from rootnoise.accounting.dominating import magnitudes
from rootnoise.accounting.monte_carlo import LARGEST, Mixture, Samples, Tilt
from rootnoise.causal import CausalMatrix

# Entries of the largest array of a block, 16 MB.
BLOCK = 2**21
# Entries that a pass over two patterns at a time may visit: about a second for all powers.
WORK = 2**26
# Steps after which ratios are brought back into the range of a float.
RESCALE = 32


def band_rows(strategy: CausalMatrix) -> Array:
    """Return |C| by diagonals, (p, n): entry (e, t) is |C_{t+e,t}|, 0 below the last row."""
    return magnitudes(strategy).by_diagonals()


class Separated(Mixture):
    """The mixture over all patterns, for a strategy in units of the noise.

    Args:
        rows: |C| by diagonals, as `band_rows` gives it, divided by the noise.
        min_sep: b >= the diagonals.
        probability: p of joining.
    """

    def __init__(self, rows: Array, min_sep: int, probability: float) -> None:
        self.rows, self.b, self.p = rows, min_sep, probability
        self.n = rows.shape[1]
        self.rate = probability / (1 + (min_sep - 1) * probability)
        self.squares = np.square(rows).sum(axis=0)
        self.mean_square = self.rate * float(self.squares.sum())
        self.mean_norm2 = float(np.square(self.rate * self._apply(np.ones((self.n, 1)))).sum())
        self.block = max(1, BLOCK // self.n)
        # Of two patterns where that takes only seconds.
        self.orders = (1, 2) if self.n * min_sep**2 <= WORK else (1,)
        self._last: tuple[Tilt, min_sep_patterns.Chain] | None = None

    def tilt(self, order: int, power: float) -> Tilt | None:
        """Return the tilt of so many patterns at a time."""
        scale = self._chain(order, power).log_scale
        return Tilt(order, power, scale) if scale <= LARGEST else None

    def remove(
        self, rng: np.random.Generator, size: int, tilt: Tilt, *others: Tilt
    ) -> tuple[Array, ...]:
        """Return log L and log dR/dQ of samples from the tilted R, then log dR'/dQ of others."""
        if self._last is None or self._last[0] != tilt:
            self._last = tilt, self._chain(tilt.order, tilt.power)
        log_x = self._log_x(rng, tilt.power * self._last[1].draw(rng, size))
        powers = {1.0: self._log_ratio(log_x)}
        for one in (tilt, *others):
            if one.power not in powers:
                powers[one.power] = self._log_ratio(one.power * log_x)
        return powers[1.0], *(t.order * powers[t.power] - t.log_scale for t in (tilt, *others))

    def add(self, rng: np.random.Generator, size: int, tau: float) -> Samples:
        """Return log L and log dR/dQ of samples from N(-tau m, 1)."""
        log_x = self._log_x(rng, np.full((self.n, size), -tau * self.rate))
        inner = self.rate * log_x.sum(axis=0) + self.mean_square / 2
        return self._log_ratio(log_x), -tau * inner - tau**2 * self.mean_norm2 / 2

    def _log_x(self, rng: np.random.Generator, means: Array) -> Array:
        """Return log x_i of y = C means + noise, (n, size)."""
        y = self._apply(means)
        y += rng.standard_normal(y.shape)
        log_x: Array = self._transposed(y) - self.squares[:, None] / 2
        return log_x

    def _log_ratio(self, log_x: Array) -> Array:
        """Return log L, or log sum_pi w_pi x_pi^theta of log x^theta: the recursion above."""
        n, b, p = self.n, self.b, self.p
        ring = np.ones((b, log_x.shape[1]))  # f_{i+1}, ..., f_{i+b}, at their step modulo b
        scale = np.zeros(log_x.shape[1])
        with np.errstate(over="ignore", invalid="ignore"):
            x = np.exp(log_x)
            for i in range(n - 1, -1, -1):
                # f_{i+b} gives its place to f_i.
                ring[i % b] = (1 - p) * ring[(i + 1) % b] + p * x[i] * ring[i % b]
                if i % RESCALE == 0:
                    top = ring.max(axis=0)
                    ring /= top
                    scale += np.log(top)
            total = ring[0] + p * ring[1:].sum(axis=0)
            result: Array = scale + np.log(total / (1 + (b - 1) * p))
        if not np.isfinite(result).all():
            raise FloatingPointError("likelihood ratios overflow")
        return result

    def _chain(self, order: int, power: float) -> min_sep_patterns.Chain:
        if order == 1:
            return min_sep_patterns.single(self.squares, self.b, self.p, power)
        return min_sep_patterns.pairs(self.squares, self._overlaps, self.b, self.p, power)

    @cached_property
    def _overlaps(self) -> Array:
        """Return <c_t, c_{t-b+a}> by step t and the other's wait a, 0 where it may join."""
        n, b, p = self.n, self.b, len(self.rows)
        found = np.zeros((n, b))
        for d in range(1, p):
            found[d:, b - d] = np.einsum("et,et->t", self.rows[d:, : n - d], self.rows[: p - d, d:])
        return found

    # ------------------------------------------------------------------------------- products

    @cached_property
    def _blocks(self) -> Array:
        """Return C cut into blocks of columns as wide as its bands: (blocks, 2 width, width)."""
        p, n = self.rows.shape
        width = max(p, 16)
        count = -(-n // width)
        rows = np.pad(self.rows, ((0, 0), (0, count * width - n))).reshape(p, count, width)
        blocks = np.zeros((count, 2 * width, width))
        columns = np.arange(width)
        for e in range(p):
            blocks[:, columns + e, columns] = rows[e]
        return blocks

    def _apply(self, v: Array) -> Array:
        """Return C v of v (n, size)."""
        count, width = self._blocks.shape[0], self._blocks.shape[2]
        v = np.pad(v, ((0, count * width - self.n), (0, 0)))
        result = np.zeros(((count + 1) * width, v.shape[1]))
        for k, block in enumerate(self._blocks):
            result[k * width : (k + 2) * width] += block @ v[k * width : (k + 1) * width]
        return result[: self.n]

    def _transposed(self, y: Array) -> Array:
        """Return C^T y of y (n, size)."""
        count, width = self._blocks.shape[0], self._blocks.shape[2]
        y = np.pad(y, ((0, (count + 1) * width - self.n), (0, 0)))
        parts = [b.T @ y[k * width : (k + 2) * width] for k, b in enumerate(self._blocks)]
        return np.concatenate(parts)[: self.n]
