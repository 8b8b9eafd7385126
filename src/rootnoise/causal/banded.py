"""Banded causal maps whose every entry is free: p diagonals, O(n p) memory and time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.linalg import lapack

from rootnoise._check import Array, RootnoiseError, matrix, set_fields
from rootnoise.causal.base import MAPS, CausalMatrix


@MAPS.add("banded", diagonals=list)
@dataclass(frozen=True, eq=False)
class Banded(CausalMatrix):
    """Lower-triangular with p diagonals: entry (t + j, t) is diagonals[j, t].

    Args:
        diagonals: shape (p, n); what would lie below the last row is ignored.

    Raises:
        RootnoiseError: not p <= n finite rows, or a zero on the main diagonal.

    >>> Banded([[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]]).dense()
    array([[1., 0., 0.],
           [4., 2., 0.],
           [0., 5., 3.]])
    """

    diagonals: Array
    n_steps: int = field(init=False)

    is_toeplitz = False

    def __post_init__(self) -> None:
        diagonals = matrix("diagonals", self.diagonals, square=False)
        p, n = diagonals.shape
        if p > n:
            raise RootnoiseError(f"diagonals must be at most n_steps={n} many, got {p}")
        if not diagonals[0].all():
            at = int(np.argmin(np.abs(diagonals[0])))
            raise RootnoiseError(f"matrix must be invertible, got 0.0 at ({at}, {at})")
        outside = np.add.outer(np.arange(p), np.arange(n)) >= n
        diagonals = np.asfortranarray(np.where(outside, 0.0, diagonals))
        diagonals.flags.writeable = False
        set_fields(self, diagonals=diagonals, n_steps=n)

    @property
    def bands(self) -> int:
        return len(self.diagonals)

    @property
    def state_size(self) -> int:
        return self.bands - 1

    def apply(self, x: Array) -> Array:
        y = np.zeros(x.shape)
        for j, diagonal in enumerate(self.diagonals):
            y[j:] += (diagonal[: self.n_steps - j] * x[: self.n_steps - j].T).T
        return y

    def solve(self, y: Array) -> Array:
        solved: Array = lapack.dtbtrs(self.diagonals, y.reshape(self.n_steps, -1), uplo="L")[0]
        return solved.reshape(y.shape)

    def column_norms(self) -> Array:
        return np.asarray(np.linalg.norm(self.diagonals, axis=0))

    def block(self, t: int, m: int) -> Array:
        # The state is the last s inputs, oldest first, zero before step 0.
        s = self.state_size
        block = np.zeros((m + s, s + m))
        for j, diagonal in enumerate(self.diagonals):
            rows = np.arange(max(0, j - t), m)
            block[rows, s - j + rows] = diagonal[t - j + rows]
        block[m:, m:] = np.eye(s)
        return block
