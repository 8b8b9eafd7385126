"""|A C^-1|_F^2 of a banded C, every entry of it free, and its gradient.

A workload of small state s is a linear system, and so is w = C^-1 z, whose state are the latest
r = p - 1 rows. Both are run over blocks of m >= r steps,

    w = V past + U z,    U = D^-1, V = -U L,

with D the block's own square of C, L what it has of the last r columns before, and x the state of
A. The covariance P of (past, x) runs forward, the quadratic form Q of what they will still cost
runs backward. A change of C moves w by -U (dD w + dL past), so that the gradient is, with W the
whole cost of (w, x) from this block on,

    -2 U^T (W_ww E[w w^T] + W_wx E[x w^T])    in D,    and with past for the last w    in L.

O(n p (p + s)) time and O(n p) memory, in matrix products.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from rootnoise._check import Array
from rootnoise.causal import CausalMatrix
from rootnoise.workload import Workload

# From diagonals of C, shape (p, n), to |A C^-1|_F^2 and its gradient.
Energy = Callable[[Array], tuple[float, Array]]

# With fewer steps a block Python dominates; with more than half of all, dense arrays are faster.
LEAST, MOST = 32, 1 / 2


def energy(workload: Workload, p: int) -> Energy:
    """Return the energy of p bands by the way that takes less time."""
    n, recurrence = workload.n_steps, workload.recurrence
    if max(LEAST, p - 1) + recurrence.state_size > MOST * n:
        return by_products(workload.matrix.dense(), p)
    return by_blocks(recurrence, p)


def by_products(a: Array, p: int) -> Energy:
    """By n x n arrays: dB = -B dC C^-1, so that the gradient is -2 B^T B C^-T."""
    n = len(a)
    rows, columns = np.add.outer(np.arange(p), np.arange(n)), np.tile(np.arange(n), (p, 1))
    inside = rows < n
    at = rows[inside], columns[inside]

    def energy(diagonals: Array) -> tuple[float, Array]:
        c, gradient = np.zeros((n, n)), np.zeros((p, n))
        c[at] = diagonals[inside]
        decoder = solve_triangular(c, a.T, lower=True, trans="T")  # B^T
        slope = solve_triangular(c, decoder @ decoder.T, lower=True).T
        gradient[inside] = -2 * slope[at]
        return float(np.vdot(decoder, decoder)), gradient

    return energy


def by_blocks(a: CausalMatrix, p: int) -> Energy:
    """By blocks of steps, of which only the last may be shorter than r."""
    n, s, r = a.n_steps, a.state_size, p - 1
    m = max(LEAST, r)
    starts = range(0, n, m)
    places = [_places(t, min(m, n - t), p, n) for t in starts]
    # Outputs and next state of a block, from its w and the state x before it.
    runs = [np.roll(a.block(t, min(m, n - t)), -s, axis=1) for t in starts]
    costs = [run[: len(run) - s].T @ run[: len(run) - s] for run in runs]

    def energy(diagonals: Array) -> tuple[float, Array]:
        entries, gradient, total = diagonals.ravel(), np.zeros(p * n), 0.0
        ahead, covariance = [], np.zeros((r + s, r + s))
        for (inside, at), run in zip(places, runs, strict=True):
            band = np.zeros(inside.shape)
            band[inside] = entries[at]
            steps = len(band)
            u = solve_triangular(band[:, r:], np.eye(steps), lower=True)
            v = -u @ band[:, :r]
            met = v @ covariance[:r]  # of w with past and x
            ww = met[:, :r] @ v.T + u @ u.T
            joint = np.block([[ww, met[:, r:]], [met[:, r:].T, covariance[r:, r:]]])
            past = np.vstack([met[:, :r], covariance[r:, :r]])
            ahead.append((u, v, np.hstack([past, joint[:, :steps]])))  # of (w, x) with past and w
            if len(ahead) < len(runs):
                moved = run[m:] @ joint
                late = moved[:, m - r : m]
                covariance = np.block([[ww[m - r :, m - r :], late.T], [late, moved @ run[m:].T]])
        later = np.zeros((r + s, r + s))
        for i in range(len(runs) - 1, -1, -1):
            (u, v, seen), (inside, at), cost = ahead[i], places[i], costs[i].copy()
            steps = len(u)
            if i + 1 < len(runs):
                last, onward = slice(m - r, m), runs[i][m:]
                across = later[:r, r:] @ onward
                cost += onward.T @ later[r:, r:] @ onward
                cost[last, last] += later[:r, :r]
                cost[last] += across
                cost[:, last] += across.T
            total += float(np.vdot(u, cost[:steps, :steps] @ u))
            slope = -2 * (u.T @ (cost[:steps] @ seen))
            gradient[at] += slope[inside]
            back = v.T @ cost[:steps]
            across = back[:, steps:]
            later = np.block([[back[:, :steps] @ v, across], [across.T, cost[steps:, steps:]]])
        return total, gradient.reshape(p, n)

    return energy


def _places(start: int, steps: int, p: int, n: int) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Return where rows of C from `start` on have entries, and where these are among diagonals.

    Columns are the p - 1 before the block, and its own.
    """
    columns = start - (p - 1) + np.arange(p - 1 + steps)
    lags = start + np.arange(steps)[:, np.newaxis] - columns
    inside = (lags >= 0) & (lags < p) & (columns >= 0)
    return inside, (lags * n + columns)[inside]
