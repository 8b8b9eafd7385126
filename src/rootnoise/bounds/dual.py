"""The dual of the factorization problem: the noise that no split of A can avoid.

Weak duality: for any A = B C, any R with Y = R R^T in the participation body and any Q of spectral
norm at most 1,

    <Q, A R> <= |B C R|_* <= |B|_F |C R|_F = |B|_F <C^T C, Y>^(1/2) <= sens(C) |B|_F,

so rmse >= |A R|_* / sqrt(n). With weights w >= 0 of the steps, sum w = 1, in front of A and B,

    max_error^2 >= sens(C)^2 sum_i w_i |B_i|^2 >= |diag(w)^(1/2) A R|_*^2,

for one participation the dual of the factorization norm gamma_2. The body is the convex hull of the
Y >= 0 that live on one person's steps, a pattern, with a diagonal of at most 1: Y = sum_p w_p Y_p
with sum w_p = 1 and any correlation matrices Y_p. For one participation and a fixed cycle the
patterns are disjoint, and the maximum over Y is the minimum over C (Slater). Under a minimal
separation there are too many to list; those of `patterns` come within 0.01 % of all of them at n =
10.

The maximiser is found by a fixed point. X = A^T (A Y A^T)^(-1/2) A is twice the gradient, and for
disjoint patterns the best C^T C for Y. Optimality says that every block X_p is a diagonal Lambda_p,
all of one trace. Were A^T A block diagonal, Y_p <- Lambda_p^-1 X_p Y_p X_p Lambda_p^-1 would do
that in one step; in general it is iterated, under Anderson (1965) acceleration. For one
participation this over-relaxes the fixed point of Denisov et al. (2022), from v <- v x to v x^2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from rootnoise._check import Array
from rootnoise.participation import (
    MinSeparation,
    Participation,
    PoissonSampling,
    SingleParticipation,
)

# Patterns of k steps each, shape (g, k); a tuple of them for every k.
Patterns = tuple[NDArray[np.intp], ...]
# R_p of every pattern, lower-triangular, shape (g, k, k).
Factors = tuple[Array, ...]

# Past iterates that Anderson acceleration combines: 5 to 20 take the same number of iterations.
HISTORY = 8
# Eigenvalues are off by up to 2e-15 of the largest (seen, n <= 1024). The bound takes DOUBT of it
# off them; for X, which must stay invertible, they are at least FLOOR of it.
DOUBT, FLOOR = 1e-14, 1e-16
# A step that the workload ignores has a zero row; this gives it a direction.
TINY = 1e-150
# Acceleration may move a coordinate, a logarithm or a ratio, by this much beyond the plain step.
LEAP = 0.3
# A drop of the value by less than this fraction is rounding, not a step that went too far.
DROP = 1e-10


@dataclass(frozen=True)
class Problem:
    """Maximise |A (R x 1_d)|_* + sum_i c_i (Y^(1/2))_ii over Y = R R^T.

    Attributes:
        a: A of shape (rows, n, d); every step counts d columns.
        patterns: which steps one person may take part in.
        gain: c >= 0 of shape (n,).
        worst: maximise |diag(w)^(1/2) A R|_* over the weights w of the rows too, sum w = 1.
    """

    a: Array
    patterns: Patterns
    gain: Array | None = None
    worst: bool = False


@dataclass(frozen=True)
class Point:
    """One feasible Y, and w where it is free.

    Attributes:
        value: of the objective, from below.
        factors: R, pattern by pattern.
        x: X, twice the gradient, shape (n, n).
        weights: w, shape (rows,); of length 0 where every row counts alike.
        shares: the part of the value that each row has, w times twice the gradient in w.
    """

    value: float
    factors: Factors
    x: Array
    weights: Array
    shares: Array


def cycles(n_steps: int, participation: Participation) -> Patterns:
    """Split the steps into patterns that one person may follow.

    They are the cycles {i, i + P, i + 2P, ...} of the shortest period P that respects both the
    separation and the number of participations; a last partial cycle makes some of them shorter.
    """
    n = n_steps
    if isinstance(participation, SingleParticipation | PoissonSampling):
        return (np.arange(n)[:, None],)
    period = min(n, max(participation.min_sep, -(-n // participation.max_participations)))
    epochs, cut = -(-n // period), (n - 1) % period + 1
    steps = np.arange(epochs * period).reshape(epochs, period).T
    return tuple(part for part in (steps[:cut], steps[cut:, : epochs - 1]) if part.size)


def patterns(n_steps: int, participation: Participation) -> Patterns:
    """Return the cycles and, under a minimal separation, patterns of k steps that drift.

    Such a pattern starts at s and takes steps of b + delta until only steps of b would reach the
    end, t_j = min(s + j (b + delta), n - 1 - (k - 1 - j) b), or it is the mirror image of one.
    """
    found = cycles(n_steps, participation)
    if not isinstance(participation, MinSeparation) or participation.max_participations == 1:
        return found
    n, b = n_steps, participation.min_sep
    k = min(participation.max_participations, -(-n // b))
    ranks, slack = np.arange(k), n - 1 - (k - 1) * b
    # All drifts that are a power of 1/2 of the largest, down to one step in all.
    halvings = np.arange(np.ceil(np.log2(max(1, slack * (k - 1)))) + 1)
    drifts = slack * np.append(0.0, 0.5**halvings)
    ideal = np.floor(ranks * (b + drifts[:, None])).astype(np.intp)
    starts = np.arange(slack + 1)[:, None, None]
    ahead = np.minimum(starts + ideal, n - 1 - (k - 1 - ranks) * b).reshape(-1, k)
    longest = [part for part in found if part.shape[1] == k]
    shorter = [part for part in found if part.shape[1] != k]
    drifting = np.unique(np.concatenate([*longest, ahead, n - 1 - ahead[:, ::-1]]), axis=0)
    return (drifting, *shorter)


def scatter(factors: Factors, patterns: Patterns, n_steps: int) -> sparse.csr_array:
    """Return R, with the columns of each pattern next to one another."""
    rows, columns, values, first = [], [], [], 0
    for factor, steps in zip(factors, patterns, strict=True):
        own = first + np.arange(steps.size).reshape(steps.shape)
        rows.append(np.broadcast_to(steps[:, :, None], factor.shape).ravel())
        columns.append(np.broadcast_to(own[:, None, :], factor.shape).ravel())
        values.append(factor.ravel())
        first += steps.size
    where = np.concatenate(rows), np.concatenate(columns)
    return sparse.csr_array((np.concatenate(values), where), shape=(n_steps, first))


def feasible(rows: Factors) -> Factors:
    """Return lower-triangular factors of the rows' Gram matrices, scaled to be feasible.

    Rows keep their directions; w_p is proportional to the square of the sum of their lengths.
    """
    rows = tuple(x + TINY * np.eye(*x.shape[1:]) for x in rows)
    lengths = [np.linalg.norm(x, axis=2) for x in rows]
    weights = [length.sum(1) ** 2 for length in lengths]
    total = sum(float(w.sum()) for w in weights)
    result = []
    for x, length, w in zip(rows, lengths, weights, strict=True):
        scaled = x * (np.sqrt(w / total)[:, None] / length)[:, :, None]
        upper = np.linalg.qr(scaled.transpose(0, 2, 1), mode="r")
        signs = np.sign(np.diagonal(upper, axis1=1, axis2=2))
        result.append((upper * signs[:, :, None]).transpose(0, 2, 1))
    return tuple(result)


def ascend(
    problem: Problem, start: Factors | None = None, weights: Array | None = None
) -> Iterator[Point]:
    """Yield ever better points, for as long as they are asked for.

    Every point is feasible and so gives a lower bound. Where the value drops, the step is retracted
    and halved. `start` defaults to equal weights without correlation, `weights` to equal ones.
    """
    rows = len(problem.a) if problem.worst else 0
    logs = np.zeros(rows) if weights is None else np.log(weights)
    if start is None:
        start = feasible(
            tuple(np.tile(np.eye(p.shape[1]), (len(p), 1, 1)) for p in problem.patterns)
        )
    u, best, damping = np.append(logs, _encode(start)), -np.inf, 1.0
    anchor, anchor_step = u, np.zeros_like(u)
    points: list[Array] = []
    steps: list[Array] = []
    while True:
        point = _evaluate(problem, _decode(u[rows:], problem.patterns), _softmax(u[:rows]))
        yield point
        if point.value < best * (1 - DROP):
            points, steps, damping = [], [], damping / 2
            u = anchor + damping * anchor_step
            continue
        moved = tuple(
            point.x[p[:, :, None], p[:, None, :]] @ factor
            for p, factor in zip(problem.patterns, point.factors, strict=True)
        )
        # Free weights w <- w z, with z the gradient, as v <- v x: z is constant at the optimum.
        logs = np.log(np.maximum(point.shares, TINY))
        step = np.append(logs, _encode(feasible(moved))) - u
        best, damping, anchor, anchor_step = max(best, point.value), 1.0, u, step
        points, steps = [*points[-HISTORY:], u], [*steps[-HISTORY:], step]
        u = u + step
        if len(steps) > 1:
            metric = np.append(np.sqrt(point.weights), _metric(anchor[rows:], problem.patterns))
            moves, changes = np.diff(points, axis=0), np.diff(steps, axis=0)
            mix = np.linalg.lstsq((changes * metric).T, step * metric, rcond=1e-10)[0]
            u = u - np.clip(mix @ (moves + changes), -LEAP, LEAP)


def _softmax(logs: Array) -> Array:
    """Return the weights of these logarithms, of sum 1."""
    weights = np.exp(logs - logs.max(initial=-np.inf))
    return np.asarray(weights / weights.sum())


def _evaluate(problem: Problem, factors: Factors, weights: Array) -> Point:
    a = problem.a
    if problem.worst:
        a = a * np.sqrt(weights)[:, None, None]
    rows, n, d = a.shape
    r = scatter(factors, problem.patterns, n)
    y = r @ r.T
    flat = a.reshape(rows, n * d)
    each = sparse.kron(y, sparse.eye_array(d), format="csr") if d > 1 else y
    squares, vectors = np.linalg.eigh((each @ flat.T).T @ flat.T)
    value = float(np.sqrt(np.maximum(squares - DOUBT * squares[-1], 0)).sum())
    sigma = np.sqrt(np.maximum(squares, FLOOR * squares[-1]))
    half = (flat.T @ (vectors / np.sqrt(sigma))).reshape(n, d * rows)
    x = half @ half.T
    if problem.gain is not None:
        gained, slope = _gains(y.toarray(), problem.gain)
        value, x = value + gained, x + slope
    shares = (vectors * vectors) @ sigma if problem.worst else np.zeros(0)
    return Point(value, factors, x, weights, shares / shares.sum())


def _gains(y: Array, gain: Array) -> tuple[float, Array]:
    """Return sum_i c_i (Y^(1/2))_ii and twice its gradient Z: Z Y^(1/2) + Y^(1/2) Z = diag(c)."""
    squares, v = np.linalg.eigh(y)
    value = float(np.sqrt(np.maximum(squares - DOUBT * squares[-1], 0)) @ (gain @ (v * v)))
    s = np.sqrt(np.maximum(squares, FLOOR * squares[-1]))
    slope = 2 * ((v.T * gain) @ v) / (s[:, None] + s)
    return value, v @ slope @ v.T


def _encode(factors: Factors) -> Array:
    """Return free coordinates: log weights, and rows of the factors over their diagonal entries."""
    parts = []
    for factor in factors:
        below = np.tril_indices(factor.shape[1], -1)
        diagonal = np.diagonal(factor, axis1=1, axis2=2)
        parts += [2 * np.log(diagonal[:, 0]), (factor / diagonal[:, :, None])[:, *below].ravel()]
    return np.concatenate(parts)


def _decode(u: Array, patterns: Patterns) -> Factors:
    """Return the factors of a feasible Y from free coordinates."""
    logs, rows = [], []
    for steps in patterns:
        g, k = steps.shape
        unit = np.tile(np.eye(k), (g, 1, 1))
        logs.append(u[:g])
        unit[:, *np.tril_indices(k, -1)] = u[g : _size(g, k)].reshape(g, -1)
        rows.append(unit / np.linalg.norm(unit, axis=2, keepdims=True))
        u = u[_size(g, k) :]
    top = max(float(log.max()) for log in logs)
    weights = [np.exp(log - top) for log in logs]
    total = sum(float(w.sum()) for w in weights)
    return tuple(
        row * np.sqrt(w / total)[:, None, None] for row, w in zip(rows, weights, strict=True)
    )


def _metric(u: Array, patterns: Patterns) -> Array:
    """Return the scale sqrt(w_p) of each coordinate: light patterns hardly matter to the value."""
    parts = []
    for steps in patterns:
        g, k = steps.shape
        root = np.exp(u[:g] / 2)
        parts += [root, np.repeat(root, k * (k - 1) // 2)]
        u = u[_size(g, k) :]
    return np.concatenate(parts)


def _size(g: int, k: int) -> int:
    """Return how many coordinates g patterns of k steps have."""
    return g * (1 + k * (k - 1) // 2)
