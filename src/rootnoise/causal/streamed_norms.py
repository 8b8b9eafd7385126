"""Row and column norms of any causal map with a small state, in O(n s^2) time and O(s^2) memory.

Feed a map unit noise: the covariance P of its state follows P' = F P F^T + G G^T, and an output
y = H s + J x has variance H P H^T + J J^T, the squared norm of its row. Run backwards, the energy
that a state will still cause gives the columns. (They are the controllability and observability
Gramians of a linear system; Kailath 1980.) Steps are taken s at a time, in matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from rootnoise._check import Array

# With fewer steps at a time Python dominates: 5 us a step for s = 2, where 16 steps take 10 us.
LEAST_STEPS = 32
# Rows made at once by `row_norms_after`: flops grow with them, passes over the state shrink.
ROWS = 8


class Streamable(Protocol):
    """What is used of a causal map."""

    n_steps: int

    @property
    def state_size(self) -> int:
        """Rows of state s."""

    def block(self, t: int, m: int) -> Array:
        """Return the (m + s, s + m) map from [state; m inputs] to [m outputs; next state]."""


def row_norms(matrix: Streamable) -> Array:
    """Return the l2 norm of every row, shape (n,)."""
    s = matrix.state_size
    covariance = np.zeros((s, s))
    squares = np.empty(matrix.n_steps)
    for t, m in _steps(matrix):
        block = matrix.block(t, m)
        state, inputs = block[:, :s], block[:, s:]
        spread = state @ covariance
        squares[t : t + m] = (spread * state)[:m].sum(1) + np.square(inputs[:m]).sum(1)
        covariance = spread[m:] @ state[m:].T + inputs[m:] @ inputs[m:].T
    return np.sqrt(squares)


def row_norms_after(matrix: Streamable, m: Array) -> Array:
    """Return the l2 norm of every row of matrix @ Toeplitz(m), m of shape (n,), in O(n^2) time.

    For an m whose own state would be large: the rows of Toeplitz(m) are windows of one array, and
    the map runs over them. Memory is O(n s).
    """
    n, s = matrix.n_steps, matrix.state_size
    rows = np.lib.stride_tricks.sliding_window_view(np.append(m[::-1], np.zeros(n - 1)), n)[::-1]
    state = np.zeros((s, n))
    squares = np.empty(n)
    for t in range(0, n, ROWS):
        block = matrix.block(t, min(ROWS, n - t))
        c = len(block) - s
        # Columns of steps to come are still zero.
        result = block @ np.vstack([state[:, : t + c], rows[t : t + c, : t + c]])
        squares[t : t + c] = np.einsum("ij,ij->i", result[:c], result[:c])
        state[:, : t + c] = result[c:]
    return np.sqrt(squares)


def column_norms(matrix: Streamable) -> Array:
    """Return the l2 norm of every column, shape (n,)."""
    s = matrix.state_size
    energy = np.zeros((s, s))
    squares = np.empty(matrix.n_steps)
    for t, m in reversed(list(_steps(matrix))):
        block = matrix.block(t, m)
        outputs, state = block[:m], block[m:]
        caused = energy @ state
        squares[t : t + m] = (np.square(outputs).sum(0) + (state * caused).sum(0))[s:]
        energy = outputs[:, :s].T @ outputs[:, :s] + state[:, :s].T @ caused[:, :s]
    return np.sqrt(squares)


def weighted_rows(matrix: Streamable, weights: Array) -> Array:
    """Return weights @ matrix for weights of shape (n,), by the map run backwards in O(n s) memory.

    What a state adds to the weighted sum of all later outputs is linear in it.
    """
    s = matrix.state_size
    added = np.zeros(s)
    result = np.empty(matrix.n_steps)
    for t, m in reversed(list(_steps(matrix))):
        both = np.append(weights[t : t + m], added) @ matrix.block(t, m)
        added, result[t : t + m] = both[:s], both[s:]
    return result


def _steps(matrix: Streamable) -> Iterator[tuple[int, int]]:
    """Yield the first step and the length of every block."""
    n, m = matrix.n_steps, max(matrix.state_size, LEAST_STEPS)
    return ((t, min(m, n - t)) for t in range(0, n, m))
