"""Products of maps, and what stays cheap where Toeplitz and diagonal ones alternate."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from itertools import groupby

import numpy as np

from rootnoise._check import Array, RootnoiseError, set_fields
from rootnoise.causal import product_norms, streamed_norms
from rootnoise.causal.base import MAPS, CausalMatrix, Inverse
from rootnoise.causal.momentum import Descent

# Arguments kept, gains, beta, g, m of `product_norms.row_norms_after_decay`.
Decaying = tuple[Array, Array, float, Array, Array]


@MAPS.add("product", left=dict, right=dict)
@dataclass(frozen=True, eq=False)
class Product(CausalMatrix):
    """The product `left @ right`; streaming runs the right map, then the left one.

    Raises:
        RootnoiseError: the two maps cover different numbers of steps.
    """

    left: CausalMatrix
    right: CausalMatrix
    n_steps: int = field(init=False)

    def __post_init__(self) -> None:
        if self.left.n_steps != self.right.n_steps:
            raise RootnoiseError(
                "factors must cover the same n_steps, "
                f"got {self.left.n_steps} and {self.right.n_steps}"
            )
        set_fields(self, n_steps=self.left.n_steps)

    def apply(self, x: Array) -> Array:
        return self.left.apply(self.right.apply(x))

    def solve(self, y: Array) -> Array:
        return self.right.solve(self.left.solve(y))

    def inverse(self) -> CausalMatrix:
        return Product(self.right.inverse(), self.left.inverse())

    def row_norms(self) -> Array:
        if isinstance(self.right, Inverse):
            known = self.right.base.decoder_row_norms(self.left)
            if known is not None:
                return known
        small = self.state_size**2 <= self.n_steps
        norms = _row_norms(chain(self)) if self._formula_pays(small) else None
        if norms is None and not small:
            before, last = _factors(self), np.eye(self.n_steps, 1)[:, 0]
            while before and before[-1].is_toeplitz:
                last = before.pop().apply(last)
            few = sum(factor.state_size for factor in before) ** 2 <= self.n_steps
            if before and len(before) < len(_factors(self)) and few:
                return streamed_norms.row_norms_after(reduce(Product, before), last)
        return super().row_norms() if norms is None else norms

    def _formula_pays(self, small: bool) -> bool:
        """Whether the formula for row norms takes less time than running the optimizer does."""
        if not any(isinstance(factor, Descent) for factor in _factors(self)):
            return True
        n, (kind, last) = self.n_steps, chain(self)[-1]
        length = product_norms.trimmed(last).size if kind == "toeplitz" else 1
        # Seconds on one core, with the state of one row and with those of all rows at once.
        running = n * (3e-6 + 1.3e-9 * (self.state_size**2 if small else n))
        return 1e-5 * length + 3e-9 * length**2 <= running

    def column_norms(self) -> Array:
        # Reflected in its anti-diagonal a Toeplitz map stays, a diagonal turns, a product swaps.
        parts = [(kind, x if kind == "toeplitz" else x[::-1]) for kind, x in chain(self)[::-1]]
        norms = _row_norms(parts)
        return super().column_norms() if norms is None else norms[::-1]

    def weighted_rows(self, weights: Array) -> Array:
        return self.right.weighted_rows(self.left.weighted_rows(weights))

    def column(self, j: int) -> Array:
        return self.left.apply(self.right.column(j))

    @property
    def is_toeplitz(self) -> bool:
        return self.left.is_toeplitz and self.right.is_toeplitz

    @property
    def bands(self) -> int:
        return min(self.n_steps, self.left.bands + self.right.bands - 1)

    @property
    def state_size(self) -> int:
        return self.left.state_size + self.right.state_size

    def block(self, t: int, m: int) -> Array:
        # States stack as [left; right]: the right map turns [right; x] into [inner; right'], the
        # left one [left; inner] into [y; left'].
        left, right = self.left.block(t, m), self.right.block(t, m)
        s = self.left.state_size
        inner = np.hstack([np.zeros((right.shape[0], s)), right])
        outer = left @ np.vstack([np.eye(s, inner.shape[1]), inner[:m]])
        return np.vstack([outer, inner[m:]])


def chain(matrix: CausalMatrix) -> list[tuple[str, Array]]:
    """Return the first columns and the diagonals that alternate in a product, in order."""
    n = matrix.n_steps
    parts: list[tuple[str, Array]] = []
    factors = [part for whole in _factors(matrix) for part in _split(whole)]
    for kind, group in groupby(factors, key=_kind):
        vector = np.ones(n) if kind == "diagonal" else np.eye(n, 1)[:, 0]
        for factor in [] if kind == "other" else list(group)[::-1]:
            vector = factor.apply(vector)
        parts.append((kind, vector))
    return parts


def _factors(matrix: CausalMatrix) -> list[CausalMatrix]:
    if isinstance(matrix, Product):
        return _factors(matrix.left) + _factors(matrix.right)
    return [matrix]


def _split(factor: CausalMatrix) -> tuple[CausalMatrix, ...]:
    return factor.factors if isinstance(factor, Descent) else (factor,)


def _kind(factor: CausalMatrix) -> str:
    if factor.is_toeplitz:
        return "toeplitz"
    return "diagonal" if factor.bands == 1 else "other"


def _row_norms(parts: list[tuple[str, Array]]) -> Array | None:
    """Return the row norms of a product of such parts, or None where no formula is known."""
    if (found := decaying(parts)) is not None:
        return product_norms.row_norms_after_decay(*found)
    match parts:
        case [("diagonal", g)]:
            return np.abs(g)
        case [("diagonal", g), *rest]:
            norms = _row_norms(rest)
            return None if norms is None else np.abs(g) * norms
        case [("toeplitz", a)]:
            return np.asarray(np.sqrt(np.cumsum(a**2)))
        case [("toeplitz", a), ("diagonal", g)]:
            return product_norms.row_norms(a, g, np.ones(1))
        case [("toeplitz", a), ("diagonal", g), ("toeplitz", m)]:
            return product_norms.row_norms(a, g, m)
    return None


def decaying(parts: list[tuple[str, Array]]) -> Decaying | None:
    """Return what `product_norms` wants of a momentum optimizer @ diagonal @ Toeplitz, or None."""
    kinds = [kind for kind, _ in parts]
    if kinds != ["diagonal", "toeplitz"] * 3:
        return None
    kept, sums, gains, filtered, g, m = (x for _, x in parts)
    beta = float(filtered[1]) if filtered.size > 1 else 0.0
    missed = np.abs(sums - 1).max(), np.abs(filtered - beta ** np.arange(filtered.size)).max()
    return (kept, gains, beta, g, m) if max(missed) <= product_norms.ROUNDING else None
