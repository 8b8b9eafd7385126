"""Slow, dense, independent twins of the fast paths: what the tests believe."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise, product
from typing import TYPE_CHECKING

import mpmath
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular, toeplitz

if TYPE_CHECKING:
    from rootnoise.causal import CausalMatrix

Array = NDArray[np.float64]


def lower_toeplitz(coefficients: Array, n: int) -> Array:
    """Return the n x n lower-triangular Toeplitz array of a first column (zeros appended)."""
    column = np.zeros(n)
    column[: len(coefficients)] = coefficients
    return toeplitz(column, np.zeros(n))


def sgd_matrix(n: int, momentum: float, decay: float) -> Array:
    """Run SGD itself on unit gradients: column t is the response to a gradient 1 at step t."""
    result = np.zeros((n, n))
    for j in range(n):
        m = theta = 0.0
        for t in range(n):
            m = momentum * m + (t == j)
            theta = decay * theta + m
            result[t, j] = theta
    return result


def square_root(matrix: Array) -> Array:
    """Return the lower-triangular root of a lower-triangular array (Bjorck & Hammarling 1983)."""
    n = len(matrix)
    root = np.diag(np.sqrt(np.diag(matrix)))
    for d in range(1, n):  # diagonal by diagonal: each entry needs those nearer to the main one
        for j in range(n - d):
            i = j + d
            inner = root[i, j + 1 : i] @ root[j + 1 : i, j]
            root[i, j] = (matrix[i, j] - inner) / (root[i, i] + root[j, j])
    return root


def banded(matrix: Array, bands: int) -> Array:
    """Keep the first `bands` diagonals on and below the main one."""
    return np.tril(matrix) - np.tril(matrix, -bands)


def decoder(workload: Array, strategy: Array) -> Array:
    """Return B = A C^-1."""
    return solve_triangular(strategy.T, workload.T, lower=False).T


def streamed(matrix: CausalMatrix, x: Array, m: int) -> Array:
    """Return M x of shape (n, d) by blocks of m steps, through the state alone."""
    state, out = np.zeros((matrix.state_size, x.shape[1])), []
    for t in range(0, len(x), m):
        rows = x[t : t + m]
        result = matrix.block(t, len(rows)) @ np.vstack([state, rows])
        out.append(result[: len(rows)])
        state = result[len(rows) :]
    return np.vstack(out)


def patterns(n: int, min_sep: int, k: int, fixed: bool) -> Iterator[tuple[int, ...]]:
    """Yield every largest-possible and smaller set of steps that one person may take part in."""
    if fixed:
        for start in range(min(min_sep, n)):
            yield tuple(range(start, n, min_sep))[:k]
        return
    for size in range(1, k + 1):
        for pattern in combinations(range(n), size):
            if all(t - s >= min_sep for s, t in pairwise(pattern)):
                yield pattern


def sensitivity(strategy: Array, min_sep: int, k: int, fixed: bool) -> float:
    """Try every pattern and every sign: the largest |C u| for scalar contributions u."""
    best = 0.0
    for pattern in patterns(len(strategy), min_sep, k, fixed):
        for signs in product((1.0, -1.0), repeat=len(pattern)):
            best = max(best, float(np.linalg.norm(strategy[:, pattern] @ np.array(signs))))
    return best


def sensitivity_by_ascent(strategy: Array, min_sep: int, k: int, fixed: bool) -> float:
    """Reach as far as contributions in k dimensions can: a lower bound of the sensitivity.

    For each pattern |C u|^2 is convex in every u_t, so replacing one by its gradient, scaled to
    norm 1, never loses. Several random starts, and that of all contributions alike.
    """
    rng = np.random.default_rng(0)
    gram = strategy.T @ strategy
    best = 0.0
    for pattern in patterns(len(strategy), min_sep, k, fixed):
        x = gram[np.ix_(pattern, pattern)]
        size = len(pattern)
        for start in range(4):
            u = rng.normal(size=(size, size)) if start else np.ones((size, size))
            u /= np.linalg.norm(u, axis=1, keepdims=True)
            for _ in range(60):
                for t in range(size):
                    slope = x[t] @ u
                    u[t] = slope / (np.linalg.norm(slope) or 1.0)
            best = max(best, float(np.sqrt(np.sum(x * (u @ u.T)))))
    return best


def sensitivity_at_most(strategy: Array, min_sep: int, k: int, fixed: bool) -> float:
    """Return the upper bound of the largest sum of |X_st| over all patterns."""
    gram = np.abs(strategy.T @ strategy)
    sums = (gram[np.ix_(p, p)].sum() for p in patterns(len(strategy), min_sep, k, fixed))
    return float(np.sqrt(max(sums)))


def sgd_power_exact(decay: float, momentum: float, exponent: float, size: int) -> list[mpmath.mpf]:
    """Return the coefficients of ((1 - alpha x)(1 - beta x))^-lambda by recurrence in 60 digits."""
    with mpmath.workdps(60):
        a, b, g = (mpmath.mpf(value) for value in (decay, momentum, exponent))
        c = [mpmath.mpf(1)]
        for j in range(1, size):
            before = (j - 2 + 2 * g) * a * b * c[j - 2] if j > 1 else 0
            c.append(((j - 1 + g) * (a + b) * c[j - 1] - before) / j)
        return c
