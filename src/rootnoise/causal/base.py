"""Causal (lower-triangular) linear maps on sequences of `n_steps` rows, and how to stream them.

Every map says how it acts on a whole sequence (`apply`, `solve`) and how it runs step by step:
from a state of s rows and m new inputs, `block(t, m)` makes m outputs and the next state. Inverses
and products stream by algebra on the blocks of their parts, so the noise engine is written once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from scipy.linalg import solve_triangular

from rootnoise._check import Array, set_fields
from rootnoise._files import Kinds
from rootnoise.causal import series, streamed_norms


class CausalMatrix(ABC):
    """A lower-triangular n x n map with a non-zero diagonal.

    `apply` and `solve` act on whole sequences of shape (n,) or (n, d); `block` streams. The rest is
    derived.
    """

    n_steps: int

    @abstractmethod
    def apply(self, x: Array) -> Array:
        """Return M x for x of shape (n,) or (n, d)."""

    @abstractmethod
    def solve(self, y: Array) -> Array:
        """Return the x with M x = y, for y of shape (n,) or (n, d)."""

    @property
    @abstractmethod
    def is_toeplitz(self) -> bool:
        """Whether every diagonal is constant, so that the first column determines the map."""

    @property
    @abstractmethod
    def bands(self) -> int:
        """How many diagonals can be non-zero, the main one included."""

    @property
    @abstractmethod
    def state_size(self) -> int:
        """Rows of memory s that a step needs from its past."""

    @abstractmethod
    def block(self, t: int, m: int) -> Array:
        """Return the (m + s, s + m) map from [state; m inputs] to [m outputs; next state].

        It starts at step t; the state before step 0 is zero, and t + m <= n_steps. For Toeplitz
        maps it is the same at every t.
        """

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description, read back by `from_dict`."""
        return MAPS.to_dict(self)

    def inverse(self) -> CausalMatrix:
        """Return the inverse map."""
        return Inverse(self)

    def column(self, j: int) -> Array:
        """Return column j, shape (n,)."""
        unit = np.zeros(self.n_steps)
        unit[j] = 1.0
        return self.apply(unit)

    @cached_property
    def coefficients(self) -> Array | None:
        """Leading coefficients of a Toeplitz map (those left out are zero); None otherwise."""
        return series.checked(self.column(0)) if self.is_toeplitz else None

    def column_norms(self) -> Array:
        """Return the l2 norm of every column, shape (n,)."""
        if self.coefficients is None:
            if self.state_size**2 <= self.n_steps:
                return streamed_norms.column_norms(self)
            return np.concatenate([np.linalg.norm(x, axis=0) for x in self._columns()])
        # Column j of a Toeplitz map holds its first n - j coefficients.
        squares = np.cumsum(np.square(self.coefficients))
        last = np.minimum(np.arange(self.n_steps, 0, -1), squares.size) - 1
        return np.asarray(np.sqrt(squares[last]))

    def row_norms(self) -> Array:
        """Return the l2 norm of every row, shape (n,)."""
        if self.coefficients is None:
            if self.state_size**2 <= self.n_steps:
                return streamed_norms.row_norms(self)
            return np.asarray(np.sqrt(sum(np.square(x).sum(axis=1) for x in self._columns())))
        return self.column_norms()[::-1]

    def weighted_rows(self, weights: Array) -> Array:
        """Return weights @ M, the sum of all rows with weights of shape (n,), shape (n,)."""
        if self.is_toeplitz:  # reflected in its anti-diagonal it stays
            return self.apply(weights[::-1])[::-1]
        if self.state_size**2 <= self.n_steps:
            return streamed_norms.weighted_rows(self, weights)
        return np.concatenate([weights @ x for x in self._columns()])

    def decoder_row_norms(self, workload: CausalMatrix) -> Array | None:
        """Return the row norms of workload @ self^-1 where a closed form is known, else None."""
        return None

    def dense(self) -> Array:
        """Return the n x n array: for oracles and small n."""
        return self.apply(np.eye(self.n_steps))

    def by_diagonals(self, p: int | None = None) -> Array:
        """Return p >= `bands` diagonals (default: `bands`), shape (p, n), in O(n p) memory.

        Entry (j, t) is that of the map at (t + j, t), 0 below the last row.
        """
        n, p = self.n_steps, min(self.bands, self.n_steps) if p is None else p
        steps = np.arange(n)
        comb = np.zeros((n, p))
        comb[steps, steps % p] = 1.0  # columns p apart do not overlap: p sums show all entries
        image = np.pad(self.apply(comb), ((0, p - 1), (0, 0)))
        return np.array([image[steps + j, steps % p] for j in range(p)])

    def _columns(self) -> Iterator[Array]:
        """Yield the columns in blocks of some million entries."""
        n = self.n_steps
        width = max(1, 2**22 // n)
        for first in range(0, n, width):
            yield self.apply(np.eye(n, min(width, n - first), -first))


MAPS: Kinds[CausalMatrix] = Kinds("matrix must be a known causal map")


@MAPS.add("inverse", base=dict)
@dataclass(frozen=True, eq=False)
class Inverse(CausalMatrix):
    """The inverse of another map; it streams by solving the block of its base for the inputs."""

    base: CausalMatrix
    n_steps: int = field(init=False)

    def __post_init__(self) -> None:
        set_fields(self, n_steps=self.base.n_steps)

    def apply(self, x: Array) -> Array:
        return self.base.solve(x)

    def solve(self, y: Array) -> Array:
        return self.base.apply(y)

    def inverse(self) -> CausalMatrix:
        return self.base

    @property
    def is_toeplitz(self) -> bool:
        return self.base.is_toeplitz

    @property
    def bands(self) -> int:
        return 1 if self.base.bands == 1 else self.n_steps

    @property
    def state_size(self) -> int:
        return self.base.state_size

    def block(self, t: int, m: int) -> Array:
        # Base: y = H s + J x, s' = F s + G x. Solved for x: x = J^-1 (y - H s), then s' as before.
        base, s = self.base.block(t, m), self.state_size
        h, j, f, g = base[:m, :s], base[:m, s:], base[m:, :s], base[m:, s:]
        x = solve_triangular(j, np.hstack([-h, np.eye(m)]), lower=True)
        return np.vstack([x, np.hstack([f, np.zeros((s, m))]) + g @ x])
