"""Norms of A diag(g) M for Toeplitz A and M, without an n x n array.

A learning-rate schedule or a column-scaled strategy leaves a diagonal g between the workload A and
the inverse strategy M. Row t of A diag(g) M is what A makes of y = g w up to step t, where w = M z
is noise with covariances G_ij = sum_{v <= j} m_v m_{v+i-j} for i >= j. Hence

    |row t|^2 = Var (A y)_t,    |A diag(g) M|_F^2 = g^T H g,    H_ij = (A^T A)_ij G_ij.

Two facts make both cheap. An SGD workload is a cascade of two one-pole filters (`poles`), so that
variances follow one-pole recursions. And M, the inverse of few bands, has decayed after J << n
coefficients, so that G is Toeplitz but for its first J columns: O(J^2 + n log n) time, O(n) memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import signal

from rootnoise._check import Array
from rootnoise.causal.streamed_norms import Streamable

# Coefficients of M below this part of the largest are rounding errors, and left out.
NEGLIGIBLE = 1e-15
# The coefficients of A follow a two-pole recurrence if they do up to this part, their rounding.
ROUNDING = 1e-13


def poles(a: Array) -> tuple[complex, complex] | None:
    """Return (alpha, beta) where a is a multiple of 1 / ((1 - alpha x)(1 - beta x)), else None.

    >>> poles(np.array([1.0, 1.5, 1.75, 1.875]))
    (1.0, 0.5)
    """
    a = np.pad(a, (0, max(0, 3 - a.size))) / a[0]
    total, product = a[1], a[1] ** 2 - a[2]
    missed = np.abs(a[2:] - total * a[1:-1] + product * a[:-2])
    if missed.max() > ROUNDING * np.abs(a).max():
        return None
    alpha, beta = (root.item() for root in np.roots([1.0, -total, product]))
    # Close poles lose digits in np.roots; the last ratio is alpha once beta^n has decayed.
    ratio = (a[-1] / a[-2]).item() if a[-2] else alpha
    if abs(ratio * (ratio - total) + product) <= 8 * np.finfo(float).eps:
        alpha, beta = ratio, (total - ratio).item()
    return alpha, beta


def row_norms(a: Array, g: Array, m: Array) -> Array | None:
    """Return the l2 norm of every row of Toeplitz(a) diag(g) Toeplitz(m), shape (n,).

    None where a has more than two poles: no short recursion is known.
    """
    found = poles(a)
    if found is None:
        return None
    alpha, beta = found
    n, m = g.size, trimmed(m)
    # u_t = y_t + beta u_{t-1} and v_t = u_t + alpha v_{t-1} = (A y)_t: first how u_{t-1} and
    # v_{t-1} respond to y_{t-lag}, then their covariances with w_t.
    kernels = np.zeros((2, n), dtype=np.result_type(alpha, beta))
    kernels[:, 1:] = np.power(beta, np.arange(n - 1)), a[: n - 1] / a[0]
    past = _convolve(kernels[:, : m.size] * _stationary(m), g)[:, :n]
    for lag, missing in _transient(m):
        rows = slice(lag, lag + missing.size)
        past[:, rows] -= np.outer(kernels[:, lag], missing * g[: missing.size])
    uy, vy = past * g  # E[u_{t-1} y_t], E[v_{t-1} y_t]
    yy = g**2 * np.cumsum(np.pad(m**2, (0, n - m.size)))
    uu = _pole(beta**2, yy + 2 * beta * uy)
    # E[v_{t-1} u_t], from u_t = beta u_{t-1} + y_t
    vu = _pole(alpha * beta, vy + beta * np.append(0.0, uu[:-1]))
    vv = _pole(alpha**2, uu + 2 * alpha * vu).real
    return np.asarray(abs(a[0]) * np.sqrt(np.maximum(vv, 0.0)))


def row_norms_after_decay(kept: Array, gains: Array, beta: float, g: Array, m: Array) -> Array:
    """Return the same for diag(kept) S diag(gains) F diag(g) Toeplitz(m), shape (n,).

    S are the prefix sums, F the powers of beta: u = F y and v = S diag(gains) u.
    """
    n, m = g.size, trimmed(m)
    # v_{t-1} responds to y_{t-lag} by K_{t-lag} - beta^lag K_t, see `block_sums_after_decay`.
    k = _pole(beta, gains[::-1])[::-1]
    powers = np.power(beta, np.arange(m.size))
    kernels = _stationary(m) * np.array([np.ones(m.size), powers])
    kernels[:, 0] = 0.0
    past = signal.fftconvolve(kernels, np.array([k * g, g]), axes=1)[:, :n]
    for lag, missing in _transient(m):
        if lag:
            rows, first = slice(lag, lag + missing.size), g[: missing.size] * missing
            past[0, rows] -= k[: missing.size] * first
            past[1, rows] -= powers[lag] * first
    vy = (past[0] - k * past[1]) * g
    uy2 = 2 * past[1] * g  # 2 beta E[u_{t-1} y_t]
    yy = g**2 * np.cumsum(np.pad(m**2, (0, n - m.size)))
    uu = _pole(beta**2, yy + uy2)
    vu = _pole(beta, vy + beta * np.append(0.0, gains[:-1] * uu[:-1]))
    return kept * np.sqrt(np.maximum(np.cumsum(gains**2 * uu + 2 * gains * vu), 0.0))


def block_sums(a: Array, g: Array, m: Array, blocks: NDArray[np.int64]) -> Array:
    """Return the sums of g_i H_ij g_j over blocks of steps, shape (k, k) for labels 0 <= .. < k.

    Args:
        a: coefficients of A, shape (n,).
        g: factors, shape (n,).
        m: coefficients of M, at most n.
        blocks: the label of each step, shape (n,), non-decreasing from 0.
    """
    found = poles(a)
    if found is None:
        return block_sums_by_lags(toeplitz_gram(a), g, m, blocks)
    # With a_{t+l} = alpha^t a_l + beta a_{t-1} beta^l, column pair (i, j = i - l) of A^T A is
    # phi_i a_l + chi_i beta^l, both of them sums over the n - i steps that are left.
    alpha, beta = found
    powers = np.power(alpha, np.arange(g.size)), beta * np.append(0.0, a[:-1]) / a[0]
    late = np.array([np.cumsum(a * f)[::-1] for f in powers]) * g * a[0]
    kernels = np.array([a / a[0], np.power(beta, np.arange(g.size))])
    return _pair_sums(late, kernels, np.array([g, g]), m, blocks)


def block_sums_after_decay(
    kept: Array, gains: Array, beta: float, g: Array, m: Array, blocks: NDArray[np.int64]
) -> Array:
    """Return the same for A = diag(kept) S diag(gains) F, S the prefix sums, F the powers of beta.

    With K_j = sum_{u>=j} gains_u beta^(u-j), column j of A is

        x_tj = kept_t (K_j - beta^(t+1-j) K_{t+1})
             = kept_t (K_j - beta^(i-j) K_i) + beta^(i-j) x_ti    for j <= i <= t,

    and A^T A has the entries K_j P_i + beta^(i-j) (Q_i - K_i P_i), with P_i = sum_t kept_t x_ti and
    Q_i = sum_t x_ti^2.

    Args:
        kept: of shape (n,).
        gains: of shape (n,).
        beta: in [0, 1).
        g: as in `block_sums`, like those that follow.
        m: M.
        blocks: labels.
    """
    left = np.cumsum(np.square(kept)[::-1])  # from here on everything runs from the last step back
    back = gains[::-1]
    k, p = _pole(beta, back), _pole(beta, back * left)
    q = _pole(beta**2, back**2 * left + 2 * beta * back * np.append(0.0, p[:-1]))
    late = np.array([p, q - k * p])[:, ::-1] * g
    kernels = np.array([np.ones(g.size), np.power(beta, np.arange(g.size))])
    return _pair_sums(late, kernels, np.array([k[::-1] * g, g]), m, blocks)


def _pair_sums(
    late: Array, kernels: Array, early: Array, m: Array, blocks: NDArray[np.int64]
) -> Array:
    """Return sums of G_ij sum_r late_ri kernels_r,i-j early_rj over blocks, and of its mirror."""
    n, k, m = blocks.size, int(blocks[-1]) + 1, trimmed(m)
    kernels = kernels[:, : m.size].copy()
    kernels[:, 0] /= 2  # the diagonal belongs to both triangles
    stationary = kernels * _stationary(m)
    lower = np.zeros((k, k))
    edges = np.searchsorted(blocks, np.arange(k + 1))
    for j, (first, stop) in enumerate(pairwise(edges)):
        rows = slice(first, min(n, stop + m.size - 1))
        inputs = early[:, first:stop]
        caused = signal.fftconvolve(stationary, inputs, axes=1)[:, : rows.stop - first]
        lower[:, j] = np.bincount(blocks[rows], (caused * late[:, rows]).sum(0).real, minlength=k)
    for lag, missing in _transient(m):
        rows, columns = slice(lag, lag + missing.size), slice(0, missing.size)
        pairs = (kernels[:, lag, np.newaxis] * late[:, rows] * early[:, columns]).sum(0).real
        _add(lower, blocks[rows], blocks[columns], -pairs * missing)
    return lower + lower.T


def block_sums_by_lags(
    gram: Iterator[Array], g: Array, m: Array, blocks: NDArray[np.int64]
) -> Array:
    """Return the same for any A, from the diagonals of A^T A, in O(n J) time.

    Args:
        gram: what `toeplitz_gram` or `streamed_gram` yields.
        g: factors, shape (n,).
        m: coefficients of M, at most n.
        blocks: the label of each step, shape (n,), non-decreasing from 0.
    """
    n, k, m = g.size, int(blocks[-1]) + 1, trimmed(m)
    lower = np.zeros((k, k))
    lags = zip(gram, _stationary(m), _transient(m), strict=False)
    for diagonal, covariance, (lag, missing) in lags:
        late, early = slice(lag, n), slice(0, n - lag)
        noise = np.full(n - lag, covariance / (2 if lag == 0 else 1))
        noise[: missing.size] -= missing / (2 if lag == 0 else 1)
        _add(lower, blocks[late], blocks[early], diagonal * noise * g[late] * g[early])
    return lower + lower.T


def toeplitz_gram(a: Array) -> Iterator[Array]:
    """Yield the diagonals (j + lag, j) of A^T A for lags 0, 1, ...; a has shape (n,)."""
    for lag in range(a.size):
        yield np.cumsum(a[: a.size - lag] * a[lag:])[::-1]


def streamed_gram(matrix: Streamable) -> Iterator[Array]:
    """Yield the diagonals (j + lag, j) of A^T A for lags 0, 1, ..., for an A of small state s.

    The energy of all outputs that a state still causes comes from a backward recursion, as in
    `streamed_norms`; entry (i, j) is what the input of step j, carried to step i by the state, has
    in common with that of step i. O(n s^2) time a diagonal.
    """
    n, s = matrix.n_steps, matrix.state_size
    steps = np.array([matrix.block(t, 1) for t in range(n)])
    h, d, f, b = steps[:, 0, :s], steps[:, 0, s], steps[:, 1:, :s], steps[:, 1:, s]
    energy = np.zeros((s, s))
    met = np.empty((n, s))  # what a state before step i has in common with the input of step i
    diagonal = np.empty(n)
    for t in range(n - 1, -1, -1):
        caused = energy @ b[t]
        met[t] = d[t] * h[t] + caused @ f[t]
        diagonal[t] = d[t] ** 2 + caused @ b[t]
        energy = np.outer(h[t], h[t]) + f[t].T @ energy @ f[t]
    yield diagonal
    state = b[:-1]  # before step j + lag, from a unit input of step j
    for lag in range(1, n):
        yield np.einsum("ts,ts->t", met[lag:], state)
        state = np.einsum("tij,tj->ti", f[lag : n - 1], state[:-1])


def trimmed(m: Array) -> Array:
    """Trim trailing coefficients that are rounding errors."""
    magnitudes = np.abs(m)
    return m[: np.flatnonzero(magnitudes > NEGLIGIBLE * magnitudes.max())[-1] + 1]


def _stationary(m: Array) -> Array:
    """Return the covariances of the noise M z at every lag once it has become stationary."""
    return np.asarray(signal.correlate(m, m)[m.size - 1 :])


def _transient(m: Array) -> Iterator[tuple[int, Array]]:
    """Yield, for each lag, by how much the covariances at steps j = 0, 1, ... are smaller.

    The filter M starts from rest, and is stationary once it has seen as many steps as it is long.
    """
    for lag in range(m.size):
        products = m[: m.size - lag] * m[lag:]
        yield lag, np.cumsum(products[:0:-1])[::-1]


def _add(total: Array, rows: NDArray[np.int64], columns: NDArray[np.int64], values: Array) -> None:
    """Add each value to its entry of total, for labels that both never decrease."""
    if values.size:
        first = np.flatnonzero(np.diff(rows, prepend=-1) | np.diff(columns, prepend=-1))
        total[rows[first], columns[first]] += np.add.reduceat(values, first)


def _convolve(kernels: Array, x: Array) -> Array:
    return np.asarray(signal.fftconvolve(kernels, x[np.newaxis], axes=1))


def _pole(root: complex, x: Array) -> Array:
    return np.asarray(signal.lfilter([1.0], [1.0, -root], x))
