"""The maps that are written down entry by entry: Toeplitz, diagonal, dense."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy import fft, signal
from scipy.linalg import solve_triangular, toeplitz

from rootnoise._check import Array, RootnoiseError, integer, matrix, set_fields, vector
from rootnoise.causal import series
from rootnoise.causal.base import MAPS, CausalMatrix


@MAPS.add("toeplitz", n_steps=int, leading=list)
@dataclass(frozen=True, eq=False)
class Toeplitz(CausalMatrix):
    """Lower-triangular Toeplitz: entry (i, j) is leading[i - j]; banded when they are fewer than n.

    Raises:
        RootnoiseError: coefficients that are none, not finite, zero at first, or more than n_steps.

    >>> Toeplitz(np.array([1.0, 0.5]), 3).dense()
    array([[1. , 0. , 0. ],
           [0.5, 1. , 0. ],
           [0. , 0.5, 1. ]])
    """

    leading: Array
    n_steps: int

    def __post_init__(self) -> None:
        integer("n_steps", self.n_steps, 1)
        c = series.checked(self.leading)
        if c.size > self.n_steps:
            raise RootnoiseError(
                f"coefficients must be at most n_steps={self.n_steps} many, got {c.size}"
            )
        if c[0] == 0:
            raise RootnoiseError("coefficients must start with a non-zero one, got 0.0")
        set_fields(self, leading=c)

    @property
    def coefficients(self) -> Array:
        return self.leading

    def apply(self, x: Array) -> Array:
        return _convolve(self.leading, x)

    def solve(self, y: Array) -> Array:
        c, n = self.leading, self.n_steps
        if n <= series.DIRECT or c.size * y.size <= series.FILTER_WORK:
            return np.asarray(signal.lfilter([1.0], c, y, axis=0))
        return _convolve(series.invert(c, n), y)

    def dense(self) -> Array:
        column = np.pad(self.leading, (0, self.n_steps - self.leading.size))
        return np.asarray(toeplitz(column, np.zeros(self.n_steps)))

    is_toeplitz = True

    @property
    def bands(self) -> int:
        return self.leading.size

    @property
    def state_size(self) -> int:
        return self.leading.size - 1

    def block(self, t: int, m: int) -> Array:
        # The state is the last s inputs, oldest first: [state; inputs] is one window of the input.
        s = self.state_size
        block = np.zeros((m + s, s + m))
        for j, c in enumerate(self.leading):
            block[np.arange(m), s - j + np.arange(m)] = c
        block[m:, m:] = np.eye(s)
        return block


@MAPS.add("diagonal", entries=list)
@dataclass(frozen=True, eq=False)
class Diagonal(CausalMatrix):
    """A diagonal map: one non-zero factor a step.

    Raises:
        RootnoiseError: no, NaN or zero entries.
    """

    entries: Array
    n_steps: int = field(init=False)

    def __post_init__(self) -> None:
        entries = vector("entries", self.entries)
        if not entries.all():
            raise RootnoiseError(f"entries must be non-zero, got 0.0 at {np.argmin(abs(entries))}")
        set_fields(self, entries=entries, n_steps=entries.size)

    def apply(self, x: Array) -> Array:
        return np.asarray((x.T * self.entries).T)

    def solve(self, y: Array) -> Array:
        return np.asarray((y.T / self.entries).T)

    is_toeplitz = False
    bands = 1
    state_size = 0

    def column_norms(self) -> Array:
        return np.abs(self.entries)

    row_norms = column_norms

    def block(self, t: int, m: int) -> Array:
        return np.diag(self.entries[t : t + m])


@MAPS.add("dense", entries=list)
@dataclass(frozen=True, eq=False)
class Dense(CausalMatrix):
    """Any lower-triangular array with a non-zero diagonal: O(n^2) memory, for small n and oracles.

    Raises:
        RootnoiseError: not square, NaN, singular, or not lower-triangular.
    """

    entries: Array
    n_steps: int = field(init=False)

    def __post_init__(self) -> None:
        entries = matrix("matrix", self.entries)
        above = np.argwhere(np.triu(entries, 1))
        if above.size:
            i, j = above[0]
            raise RootnoiseError(
                f"matrix must be lower-triangular (causal), got {entries[i, j]:g} at ({i}, {j})"
            )
        zeros = np.flatnonzero(np.diag(entries) == 0)
        if zeros.size:
            raise RootnoiseError(f"matrix must be invertible, got 0.0 at ({zeros[0]}, {zeros[0]})")
        set_fields(self, entries=entries, n_steps=entries.shape[0])

    def apply(self, x: Array) -> Array:
        return np.asarray(self.entries @ x)

    def solve(self, y: Array) -> Array:
        return np.asarray(solve_triangular(self.entries, y, lower=True))

    def dense(self) -> Array:
        return self.entries

    def _columns(self) -> Iterator[Array]:
        yield self.entries

    is_toeplitz = False

    @cached_property
    def bands(self) -> int:
        rows, columns = np.nonzero(self.entries)
        return int((rows - columns).max()) + 1

    @property
    def state_size(self) -> int:
        return self.bands - 1

    def block(self, t: int, m: int) -> Array:
        # As for a banded Toeplitz map the state is the last s inputs, zero before step 0.
        s = self.state_size
        block = np.zeros((m + s, s + m))
        first = max(0, t - s)
        block[:m, s - t + first :] = self.entries[t : t + m, first : t + m]
        block[m:, m:] = np.eye(s)
        return block


def _convolve(c: Array, x: Array) -> Array:
    """Return the first n rows of the convolution of c with each column of x (n rows)."""
    n = x.shape[0]
    if c.size == 1:
        return np.asarray(c[0] * x)
    if n <= series.DIRECT or c.size <= 64:
        return np.asarray(signal.lfilter(c, [1.0], x, axis=0))
    length = fft.next_fast_len(n + c.size - 1, real=True)
    spectrum = fft.rfft(c, length).reshape((-1,) + (1,) * (x.ndim - 1))
    return np.asarray(fft.irfft(spectrum * fft.rfft(x, length, axis=0), length, axis=0)[:n])
