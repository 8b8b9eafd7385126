"""Causal (lower-triangular) linear maps on sequences of `n_steps` rows, and how to stream them.

Every map says how it acts on a whole sequence (`apply`, `solve`) and how it runs step by step:
from a state of s rows and m new inputs, `block(t, m)` makes m outputs and the next state. Inverses
and products stream by algebra on the blocks of their parts, so the noise engine is written once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, reduce
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import fft, signal
from scipy.linalg import solve_triangular, toeplitz

from rootnoise import gramian, sandwich, series
from rootnoise._check import RootnoiseError, integer, matrix, vector

Array = NDArray[np.float64]
M = TypeVar("M", bound="CausalMatrix")


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
        """Whether every diagonal is constant, so that the first column says all."""

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

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description, read back by `from_dict`."""

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
                return gramian.column_norms(self)
            return np.concatenate([np.linalg.norm(x, axis=0) for x in self._columns()])
        # Column j of a Toeplitz map holds its first n - j coefficients.
        squares = np.cumsum(np.square(self.coefficients))
        last = np.minimum(np.arange(self.n_steps, 0, -1), squares.size) - 1
        return np.asarray(np.sqrt(squares[last]))

    def row_norms(self) -> Array:
        """Return the l2 norm of every row, shape (n,)."""
        if self.coefficients is None:
            if self.state_size**2 <= self.n_steps:
                return gramian.row_norms(self)
            return np.asarray(np.sqrt(sum(np.square(x).sum(axis=1) for x in self._columns())))
        return self.column_norms()[::-1]

    def dense(self) -> Array:
        """Return the n x n array: for oracles and small n."""
        return self.apply(np.eye(self.n_steps))

    def _columns(self) -> Iterator[Array]:
        """Yield the columns in blocks of some million entries."""
        n = self.n_steps
        width = max(1, 2**22 // n)
        for first in range(0, n, width):
            yield self.apply(np.eye(n, min(width, n - first), -first))


@dataclass(frozen=True, eq=False)
class Toeplitz(CausalMatrix):
    """Lower-triangular Toeplitz: entry (i, j) is leading[i - j]; banded when they are fewer than n.

    Raises:
        RootnoiseError: no, or NaN, coefficients, a zero first one, or more of them than n_steps.

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
        object.__setattr__(self, "leading", c)

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

    def to_dict(self) -> dict[str, Any]:
        return {"type": "toeplitz", "n_steps": self.n_steps, "leading": self.leading.tolist()}


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
        object.__setattr__(self, "entries", entries)
        object.__setattr__(self, "n_steps", entries.size)

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

    def to_dict(self) -> dict[str, Any]:
        return {"type": "diagonal", "entries": self.entries.tolist()}


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
        object.__setattr__(self, "entries", entries)
        object.__setattr__(self, "n_steps", entries.shape[0])

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

    def to_dict(self) -> dict[str, Any]:
        return {"type": "dense", "entries": self.entries.tolist()}


@dataclass(frozen=True, eq=False)
class Inverse(CausalMatrix):
    """The inverse of another map; it streams by solving the block of its base for the inputs."""

    base: CausalMatrix
    n_steps: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_steps", self.base.n_steps)

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

    def to_dict(self) -> dict[str, Any]:
        return {"type": "inverse", "base": self.base.to_dict()}


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
        object.__setattr__(self, "n_steps", self.left.n_steps)

    def apply(self, x: Array) -> Array:
        return self.left.apply(self.right.apply(x))

    def solve(self, y: Array) -> Array:
        return self.right.solve(self.left.solve(y))

    def inverse(self) -> CausalMatrix:
        return Product(self.right.inverse(), self.left.inverse())

    def row_norms(self) -> Array:
        parts = chain(self)
        norms = _row_norms(parts)
        if norms is None and parts[-1][0] == "toeplitz" and self.state_size**2 > self.n_steps:
            before = _factors(self)
            while before[-1].is_toeplitz:
                before.pop()
            if sum(factor.state_size for factor in before) ** 2 <= self.n_steps:
                return gramian.row_norms_after(reduce(Product, before), parts[-1][1])
        return super().row_norms() if norms is None else norms

    def column_norms(self) -> Array:
        # Reflected in its anti-diagonal a Toeplitz map stays, a diagonal turns, a product swaps.
        parts = [(kind, x if kind == "toeplitz" else x[::-1]) for kind, x in chain(self)[::-1]]
        norms = _row_norms(parts)
        return super().column_norms() if norms is None else norms[::-1]

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

    def to_dict(self) -> dict[str, Any]:
        return {"type": "product", "left": self.left.to_dict(), "right": self.right.to_dict()}


_READERS: dict[str, Callable[..., CausalMatrix]] = {}


def readable(kind: str) -> Callable[[type[M]], type[M]]:
    """Let `from_dict` read a map of another module, by calling its class on the fields."""

    def add(matrix: type[M]) -> type[M]:
        _READERS[kind] = matrix
        return matrix

    return add


def from_dict(fields: dict[str, Any]) -> CausalMatrix:
    """Rebuild a map from `to_dict`; every check of the constructors runs again.

    Raises:
        RootnoiseError: an unknown type, or fields that are missing or do not belong.
    """
    match fields:
        case {"type": "toeplitz", "n_steps": int(n), "leading": list(leading), **rest} if not rest:
            return Toeplitz(vector("leading", leading), n)
        case {"type": "diagonal", "entries": list(entries), **rest} if not rest:
            return Diagonal(vector("entries", entries))
        case {"type": "dense", "entries": list(entries), **rest} if not rest:
            return Dense(matrix("entries", entries))
        case {"type": "inverse", "base": dict(base), **rest} if not rest:
            return Inverse(from_dict(base))
        case {"type": "product", "left": dict(left), "right": dict(right), **rest} if not rest:
            return Product(from_dict(left), from_dict(right))
        case {"type": str(kind), **rest} if kind in _READERS:
            try:
                return _READERS[kind](**rest)
            except TypeError:  # fields that are missing or do not belong: refused below
                pass
    raise RootnoiseError(f"matrix must be a known causal map, got {fields!s:.60}")


def chain(matrix: CausalMatrix) -> list[tuple[str, Array]]:
    """Return the first columns and the diagonals that alternate in a product, in order."""
    n = matrix.n_steps
    parts: list[tuple[str, Array]] = []
    for kind, group in groupby(_factors(matrix), key=_kind):
        vector = np.ones(n) if kind == "diagonal" else np.eye(n, 1)[:, 0]
        for factor in [] if kind == "other" else list(group)[::-1]:
            vector = factor.apply(vector)
        parts.append((kind, vector))
    return parts


def _factors(matrix: CausalMatrix) -> list[CausalMatrix]:
    if isinstance(matrix, Product):
        return _factors(matrix.left) + _factors(matrix.right)
    return [matrix]


def _kind(factor: CausalMatrix) -> str:
    if factor.is_toeplitz:
        return "toeplitz"
    return "diagonal" if factor.bands == 1 else "other"


def _row_norms(parts: list[tuple[str, Array]]) -> Array | None:
    """Return the row norms of a product of such parts, or None where only its columns can tell."""
    match parts:
        case [("diagonal", g)]:
            return np.abs(g)
        case [("diagonal", g), *rest]:
            norms = _row_norms(rest)
            return None if norms is None else np.abs(g) * norms
        case [("toeplitz", a)]:
            return np.asarray(np.sqrt(np.cumsum(a**2)))
        case [("toeplitz", a), ("diagonal", g)]:
            return sandwich.row_norms(a, g, np.ones(1))
        case [("toeplitz", a), ("diagonal", g), ("toeplitz", m)]:
            return sandwich.row_norms(a, g, m)
    return None


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
