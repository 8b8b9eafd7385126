"""The best strategy with p bands, every entry free (BandMF, Choquette-Choo et al. 2023).

Where p is at most the separation, the columns of one person are orthogonal, and the sensitivity is
known from their norms alone, which are fixed to s_e in the window e of b steps. So L-BFGS runs over
the entries E in the band and log s; C is E with its columns scaled. The objective is

    log |B|_F^2 + log sum_e s_e^2,    B = A C^-1.

For a workload of small state |B|_F^2 is the energy of a linear system driven by unit noise: its
state is the latest p - 1 rows of w = C^-1 z and the state of A. Its covariance P runs forward, the
quadratic form Q of what the state will still cost runs backward, and the gradient of row t of C
needs just these two: O(n p^2) time, O(n p) memory.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from rootnoise._check import Array, integer, real
from rootnoise.causal import CausalMatrix
from rootnoise.causal.banded import Banded
from rootnoise.factorization.base import (
    Factorization,
    Progress,
    Search,
    default_bands,
    register,
)
from rootnoise.factorization.lbfgs import lbfgs
from rootnoise.factorization.scaled import epoch_scaled
from rootnoise.participation import FixedCycle, MinSeparation, Participation
from rootnoise.workload import Workload

Indices = NDArray[np.intp]
# From diagonals of C, shape (p, n), to |A C^-1|_F^2 and its gradient.
Energy = Callable[[Array], tuple[float, Array]]

LARGEST = 4096
MAX_ITERATIONS = 500
# The recursion takes 0.1 ms a step and more for states above this part of n; dense products take
# 0.1 s at n = 800.
NARROW, DENSE = 1 / 8, 800


@register("bandmf")
def bandmf(
    workload: Workload,
    participation: Participation,
    bands: int | None = None,
    tolerance: float = 1e-6,
    progress: Progress | None = None,
) -> Factorization:
    """C = any p bands of least error (BandMF, Choquette-Choo et al. 2023), one norm for each epoch.

    It is `banded` without the demand that the strategy be Toeplitz, and `epoch-scaled` with all
    its entries optimised, from which it starts. A stream is as cheap as that of any p bands.

    Args:
        workload: at most 4096 steps.
        participation: who may take part when.
        bands: p (default: the separation, or 32 for one participation), at most the separation.
        tolerance: the relative gain of an iteration at which to stop, over 100.
        progress: called with the number of iterations and the rmse.

    Raises:
        RootnoiseError: too many steps, bands beyond the separation, or a tolerance outside (0, 1).

    >>> from rootnoise.participation import SingleParticipation
    >>> from rootnoise.workload import prefix_sum
    >>> once = SingleParticipation()
    >>> round(bandmf(prefix_sum(100), once, bands=20).rmse(once), 3)
    2.506
    """
    n = integer("n_steps", workload.n_steps, 1, LARGEST)
    tolerance = real("tolerance", tolerance, above=0, below=1)
    separation = default_bands(n, participation)
    p = min(separation, 32 if separation == n else n)
    if bands is not None:
        p = integer("bands", bands, 1, separation, high_name=_limit(n, separation))

    def build(strategy: CausalMatrix) -> Factorization:
        return Factorization("bandmf", workload, strategy)

    search = Search(build, participation, progress)
    start = epoch_scaled(workload, participation, bands=p).strategy
    search(start)
    windows, repeats = _windows(n, participation)

    objective = _Objective(_energy(workload, p), windows, (p, n))
    found = lbfgs(
        objective,
        objective.coordinates(start.by_diagonals(p)),
        ftol=tolerance / 100,
        gtol=0.0,
        most=MAX_ITERATIONS,
        report=lambda value: search.report_objective(value + np.log(repeats / n)),
    )
    search(Banded(objective.strategy(found)[0]))
    return search.best


def _limit(n: int, separation: int) -> str:
    return "n_steps" if separation == n else "separation"


def _windows(n: int, participation: Participation) -> tuple[Indices, int]:
    """Return the window of each step, and how often a person who meets them all enters each.

    With more windows than participations one would pick those of the largest norm: all are one.
    """
    match participation:
        case MinSeparation(b, k) | FixedCycle(b, k) if k > 1:
            return (np.arange(n) // b, 1) if n <= k * b else (np.zeros(n, np.intp), k)
    return np.zeros(n, np.intp), 1


class _Objective:
    """2 log rmse, up to a constant, of log s and the entries in the band: see above."""

    def __init__(self, energy: Energy, windows: Indices, shape: tuple[int, int]) -> None:
        self._energy, self._windows, self._shape = energy, windows, shape
        self._inside = np.add.outer(*map(np.arange, shape)) < shape[1]
        self._count = int(windows.max()) + 1

    def coordinates(self, diagonals: Array) -> Array:
        """Return the coordinates of these diagonals, the norms of a window replaced by a mean."""
        norms = np.linalg.norm(diagonals, axis=0)
        means = np.bincount(self._windows, np.log(norms)) / np.bincount(self._windows)
        return np.append(means, (diagonals / norms)[self._inside])

    def strategy(self, u: Array) -> tuple[Array, Array, Array]:
        """Return the diagonals, what scaled each column, and s^2."""
        c, s = np.zeros(self._shape), np.exp(u[: self._count])
        c[self._inside] = u[self._count :]
        scale = s[self._windows] / np.linalg.norm(c, axis=0)
        return c * scale, scale, s * s

    def __call__(self, u: Array) -> tuple[float, Array]:
        """Return the value and the gradient."""
        c, scale, squares = self.strategy(u)
        error, slope = self._energy(c)
        slope = slope / error
        along = (slope * c).sum(0)
        # Along a column lies the change of its window's norm; across, that of its direction.
        of_norms = np.bincount(self._windows, along) + 2 * squares / squares.sum()
        of_entries = (slope - c * (along / squares[self._windows])) * scale
        value = float(np.log(error * squares.sum()))
        return value, np.append(of_norms, of_entries[self._inside])


def _energy(workload: Workload, p: int) -> Energy:
    n, recurrence = workload.n_steps, workload.recurrence
    if n <= DENSE or p + recurrence.state_size > NARROW * n:
        return _dense_energy(workload.matrix.dense(), p)
    return _streamed_energy(recurrence, p)


def _dense_energy(a: Array, p: int) -> Energy:
    """By products of n x n arrays: dB = -B dC C^-1, so that the gradient is -2 B^T B C^-T."""
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


def _streamed_energy(a: CausalMatrix, p: int) -> Energy:
    """By covariances of the state [w_{t-p+1}, ..., w_{t-1} in a ring; state of A]."""
    n, s, ring = a.n_steps, a.state_size, p - 1
    q = ring + s
    blocks = [a.block(t, 1) for t in range(n)]
    # Slot of the ring that holds w_{t-j}, for j = 1, ..., p - 1.
    slots = (np.arange(n)[:, None] - np.arange(1, p)) % max(1, ring)
    steps = np.maximum(np.arange(n)[:, None] - np.arange(p), 0)  # columns of row t of C

    def energy(diagonals: Array) -> tuple[float, Array]:
        entries = diagonals[np.arange(p), steps]  # C_{t,t-j}
        entries[np.arange(n)[:, None] < np.arange(p)] = 0.0
        # w_t = phi_t z_t + weights_t state
        phi = 1 / entries[:, 0]
        weights = np.zeros((n, q))
        np.put_along_axis(weights, slots, -entries[:, 1:] * phi[:, None], axis=1)
        total, covered = _forward(blocks, weights, phi, ring)
        of_weights, of_phi = _backward(blocks, weights, phi, ring, covered)
        of_entries = np.empty((n, p))
        of_past = np.take_along_axis(of_weights, slots, axis=1)
        of_entries[:, 1:] = -of_past * phi[:, None]
        of_entries[:, 0] = phi**2 * ((of_past * entries[:, 1:]).sum(1) - of_phi)
        gradient = np.zeros((p, n))
        for j in range(p):
            gradient[j, : n - j] = of_entries[j:, j]
        return total, gradient

    return energy


def _forward(
    blocks: list[Array], weights: Array, phi: Array, ring: int
) -> tuple[float, _Covariances]:
    """Return the energy of all outputs, and the covariances on the way."""
    q = weights.shape[1]
    covariance, total = np.zeros((q, q)), 0.0
    covariances = _Covariances(covariance, ring, len(blocks))
    for t, (block, c) in enumerate(zip(blocks, weights, strict=True)):
        h, d, f, g = block[0, :-1], block[0, -1], block[1:, :-1], block[1:, -1]
        covariances.save(t)
        v = covariance @ c
        var = phi[t] ** 2 + c @ v
        total += h @ covariance[ring:, ring:] @ h + d * (2 * (h @ v[ring:]) + d * var)
        moved = f @ covariance[ring:] + np.outer(g, v)
        met = f @ v[ring:] + g * var
        moved[:, ring:] = moved[:, ring:] @ f.T + np.outer(met, g)
        covariances.write(t, v, var, met, moved)
    return float(total), covariances


def _backward(
    blocks: list[Array], weights: Array, phi: Array, ring: int, covariances: _Covariances
) -> tuple[Array, Array]:
    """Return the gradients of the energy in the weights and in phi."""
    n, q = weights.shape
    of_weights, of_phi = np.empty((n, q)), np.empty(n)
    cost = np.zeros((q, q))
    for t in range(n - 1, -1, -1):
        block, c = blocks[t], weights[t]
        h, d, f, g = block[0, :-1], block[0, -1], block[1:, :-1], block[1:, -1]
        covariance = covariances.restore(t)
        rho = cost[:, ring:] @ g
        if ring:
            rho += cost[:, t % ring]
        own = d * d + g @ rho[ring:] + (rho[t % ring] if ring else 0.0)
        cost[:, ring:] = cost[:, ring:] @ f
        cost[ring:] = f.T @ cost[ring:]
        cost[ring:, ring:] += np.outer(h, h)
        rho[ring:] = f.T @ rho[ring:] + d * h
        if ring:
            rho[t % ring] = cost[t % ring] = cost[:, t % ring] = 0.0
        of_weights[t] = 2 * (covariance @ (rho + own * c))
        of_phi[t] = 2 * own * phi[t]
        update = np.outer(rho + own / 2 * c, c)
        cost += update
        cost += update.T
    return of_weights, of_phi


class _Covariances:
    """The covariance of the state, overwritten step by step, and what undoes each step."""

    def __init__(self, covariance: Array, ring: int, n_steps: int) -> None:
        q = len(covariance)
        self._now, self._ring = covariance, ring
        self._slots, self._rest = np.empty((n_steps, q)), np.empty((n_steps, q - ring, q))

    def save(self, t: int) -> None:
        """Remember what step t will overwrite."""
        if self._ring:
            self._slots[t] = self._now[t % self._ring]
        self._rest[t] = self._now[self._ring :]

    def write(self, t: int, v: Array, var: float, met: Array, moved: Array) -> None:
        """Step on: `moved` for the state of A, and the new w of covariances v, var and `met`."""
        ring = self._ring
        self._now[ring:], self._now[:, ring:] = moved, moved.T
        if ring:
            v = np.append(v[:ring], met)
            v[t % ring] = var
            self._now[t % ring] = self._now[:, t % ring] = v

    def restore(self, t: int) -> Array:
        """Return the covariance before step t."""
        ring = self._ring
        self._now[ring:], self._now[:, ring:] = self._rest[t], self._rest[t].T
        if ring:
            self._now[t % ring] = self._now[:, t % ring] = self._slots[t]
        return self._now
