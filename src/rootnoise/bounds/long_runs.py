"""A small dual problem whose value bounds that of a workload of any length from below.

Cut the steps into blocks, the same ones in every period, and let Y be constant on each: all steps
of a block share one weight, and step r of it is correlated with step r of other blocks of its
length. So R acts on whole blocks, as a multiple of the identity. In each take an orthonormal V, the
d slowest cosines, with complement V'. For any orthonormal U whose span holds all of A R V,

    |A R|_* >= |A R V|_* + |(1 - U U^T) A R V'|_*,

as the two parts act between orthogonal spaces. The first is the dual of a small problem, A V for A.
For the second let U also span, in every block, what any earlier step can cause there: for a state
of s numbers these are s + d columns a block. Then only the block's own square of A is left, A_i,
and the term is at least sum_i nu_i (Y^(1/2))_ii with

    nu_i = |(1 - U U^T) A_i V'|_* >= |A_i|_* - |U^T A_i|_*    (triangle inequality).

At n = 1000 a small problem of 500 rows is 0.5 % below the optimum for one participation in prefix
sums, and 0.8 % for 10 epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, signal

from rootnoise._check import Array
from rootnoise.bounds import nuclear_norm
from rootnoise.bounds.dual import DOUBT, Patterns, Problem, cycles, patterns
from rootnoise.causal import CausalMatrix
from rootnoise.participation import (
    MinSeparation,
    Participation,
    PoissonSampling,
    SingleParticipation,
)
from rootnoise.workload import SGD, Workload

# Pieces of a period: at least so many where patterns drift, where they do not, and in all epochs.
DRIFTING, STILL, LEAST = 4, 2, 16
# Workloads whose state is at most this large are swept block by block, others applied to V.
STATE = 8
# Blocks that come from `CausalMatrix.block` are arrays of this size at most.
LONGEST = 1024
# A sweep takes 30 us a block.
MOST_BLOCKS = 2**17
# Blocks this short have their nu computed, not bounded: 0.4 % more at n = 1000, in 0.1 s.
SHORT = 512
# Numbers of A V where it is held whole: 64 MB, and a few times that for the FFT.
HELD = 2**23


@dataclass(frozen=True)
class Block:
    """What one block makes of unit states and of the columns of V: s + d columns.

    Attributes:
        outputs: their triangular factor: only lengths and angles matter.
        states: the state after it, shape (s, s + d).
        rest: nu >= 0.
    """

    outputs: Array
    states: Array
    rest: float


Blocks = Callable[[int, int, int], Block]


@dataclass(frozen=True)
class Layout:
    """How the steps are cut. The rows of Y are the pieces of a period, tied epoch by tied epoch.

    Attributes:
        n: steps.
        period: steps of a period; the last one may be partial.
        pieces: first step and length of each piece of a period.
        equal: how many of the first pieces are equally long, so that patterns may drift among them.
        tied: epochs in a row that share one row of R, where there are too many of them.
        participations: tied epochs in which one person may take part.
        d: columns of V in a block.
    """

    n: int
    period: int
    pieces: list[tuple[int, int]]
    equal: int
    tied: int
    participations: int
    d: int

    @property
    def rows(self) -> int:
        """Rows of Y."""
        return -(-self.n // (self.period * self.tied)) * len(self.pieces)

    def blocks(self) -> Iterator[tuple[int, int, int, bool]]:
        """Yield in time order each block's row, first step and length, and whether it is whole."""
        for e in range(-(-self.n // self.period)):
            for i, (start, h) in enumerate(self.pieces):
                first = e * self.period + start
                if first < self.n:
                    row = e // self.tied * len(self.pieces) + i
                    yield row, first, min(h, self.n - first), first + h <= self.n

    def patterns(self) -> Patterns:
        """Return patterns of rows; a block cut off by the last step is in none: its weight is 0."""
        count = len(self.pieces)
        whole = np.unique([row for row, _, _, whole in self.blocks() if whole])
        found: list[NDArray[np.intp]] = []
        drifting = whole[whole % count < self.equal]
        if drifting.size:
            within = MinSeparation(self.equal, self.participations)
            found += [drifting[p] for p in patterns(drifting.size, within)]
        for i in range(self.equal, count):
            own = whole[whole % count == i]
            if own.size:
                found += [own[p] for p in cycles(own.size, MinSeparation(1, self.participations))]
        sizes = sorted({p.shape[1] for p in found})
        return tuple(np.concatenate([p for p in found if p.shape[1] == k]) for k in sizes)


def sweeps(workload: Workload) -> bool:
    """Whether the state of the workload is small, so that the second term can be had."""
    return isinstance(workload, SGD) or workload.matrix.state_size <= STATE


def compress(workload: Workload, participation: Participation, size: int) -> Problem | None:
    """Return the small problem, of at most about `size` rows.

    None where a sweep would take too long, with more than some 65,000 epochs.
    """
    n, a = workload.n_steps, workload.matrix
    swept = sweeps(workload)
    longest = LONGEST if swept and not isinstance(workload, SGD) else n
    layout = _layout(n, participation, size if swept else min(size, HELD // n), longest)
    rows, d = layout.rows, layout.d
    if rows * layout.tied > MOST_BLOCKS:
        return None
    if swept:
        blocks = _sgd_blocks(workload) if isinstance(workload, SGD) else _blocks(a)
        gram, gain = _sweep(blocks, layout)
    else:
        v = np.zeros((n, rows, d))
        for row, start, h, whole in layout.blocks():
            if whole:
                c = _cosines(h, min(d, h)) / np.sqrt(h)
                v[start : start + h, row, : c.shape[1]] = c
        av = a.apply(v.reshape(n, -1))
        gram, gain = av.T @ av, np.zeros(rows)
    squares, vectors = np.linalg.eigh(gram)
    root = vectors * np.sqrt(np.maximum(squares - DOUBT * squares[-1], 0))
    return Problem(root.T.reshape(-1, rows, d), layout.patterns(), gain)


def _layout(n: int, participation: Participation, size: int, longest: int) -> Layout:
    """Choose the pieces and how many epochs to tie."""
    if isinstance(participation, SingleParticipation | PoissonSampling):
        period, k = n, 1
    else:
        period, k = participation.min_sep, participation.max_participations
    period = min(n, period)
    epochs = -(-n // period)
    drifting = isinstance(participation, MinSeparation) and epochs > 1
    # Under 4 columns of V a block, more of them are worth more than drifting.
    wanted = DRIFTING if drifting and 4 * DRIFTING * epochs <= size else STILL
    wanted = max(wanted, -(-LEAST // epochs), -(-period // longest))
    wanted = min(wanted, period, size)
    if drifting:
        h = period // wanted
        pieces = [(i * h, h) for i in range(wanted)]
        pieces += [(wanted * h, period % wanted)] if period % wanted else []
    else:
        # A partial last epoch ends where a piece does.
        cut = (n - 1) % period + 1
        first = max(1, round(wanted * cut / period))
        edges = np.append(
            np.linspace(0, cut, first + 1), np.linspace(cut, period, max(1, wanted - first) + 1)
        )
        edges = np.unique(edges.astype(np.intp))
        pieces = [(int(a), int(b - a)) for a, b in pairwise(edges)]
    tied = -(-epochs * len(pieces) // size)
    if tied > 1 and epochs > k:  # tied epochs would be too many for one person: spread them out
        return _layout(n, MinSeparation(-(-n // k), k), size, longest)
    ties = -(-epochs // tied)
    d = max(1, min(max(h for _, h in pieces), size // (ties * len(pieces))))
    return Layout(n, period, pieces, wanted if drifting else 0, tied, min(ties, k), d)


def _sweep(blocks: Blocks, layout: Layout) -> tuple[Array, Array]:
    """Return (A V)^T A V, from the state that every column of V leaves behind, and the gains."""
    d, rows = layout.d, layout.rows
    gram, gain, alike = np.zeros((rows * d, rows * d)), np.zeros(rows), np.zeros(rows)
    state: Array | None = None
    stack: list[Array] = []
    for row, start, h, whole in layout.blocks():
        own = row * d + np.arange(min(d, h) if whole else 0)
        block = blocks(start, h, own.size)
        s = len(block.states)
        state = np.zeros((s, rows * d)) if state is None else state
        outputs = block.outputs[:, :s] @ state
        outputs[:, own] += block.outputs[:, s:] / np.sqrt(h)
        state = block.states[:, :s] @ state
        state[:, own] += block.states[:, s:] / np.sqrt(h)
        if whole:
            gain[row] += block.rest / np.sqrt(h)
            alike[row] += 1
        stack.append(outputs)
        if len(stack) * (s + d) > rows * d:
            gram, stack = gram + _gram(stack), []
    if stack:
        gram += _gram(stack)
    # r equal rows of R stack to sqrt(r) times one, or at least to sqrt(r) times the mean of nu.
    return gram, gain / np.sqrt(np.maximum(alike, 1))


def _gram(stack: list[Array]) -> Array:
    rows = np.concatenate(stack)
    return rows.T @ rows


def _cosines(h: int, d: int) -> Array:
    """Return the first d columns of the orthonormal DCT-II basis of length h."""
    angles = np.outer(np.arange(h) + 0.5, np.arange(d)) * (np.pi / h)
    return np.asarray(np.cos(angles) * np.sqrt(np.where(np.arange(d), 2, 1) / h))


def _sgd_blocks(workload: SGD) -> Blocks:
    """Blocks of a workload with the state (y, m): y' = alpha y + m', m' = beta m + u."""
    alpha, beta = workload.decay, workload.momentum

    def run(u: Array) -> tuple[Array, Array]:
        m = signal.lfilter([1.0], [1.0, -beta], u, axis=0)
        return signal.lfilter([1.0], [1.0, -alpha], m, axis=0), m

    @cache
    def block(h: int, d: int) -> Block:
        v = _cosines(h, d)
        y, m = run(v)
        # A state (1, 0) leaves alpha, alpha^2, ...; (0, 1) is like a first input of beta.
        powers = np.power(alpha, np.arange(1.0, h + 1))
        of_m, left = run(beta * np.eye(h, 1))
        outputs = np.column_stack([powers, of_m, y])
        states = np.array([outputs[-1], [0.0, left[-1, 0], *m[-1]]])
        u, triangle = np.linalg.qr(outputs)
        if h <= SHORT:
            rest = _rest(run(np.eye(h))[0], u, v)
        else:
            reached = run(u[::-1])[0]  # A^T U upside down
            rest = nuclear_norm.sgd(h, beta, alpha) - float(linalg.svdvals(reached).sum())
        return Block(triangle, states, max(0.0, rest))

    return lambda t, h, d: block(h, d)


def _blocks(a: CausalMatrix) -> Blocks:
    """Blocks of any map with a small state; |A_i|_* is at least <Q, A_i> for another block's Q."""
    s = a.state_size
    polar: dict[int, Array] = {}

    def block(t: int, h: int, d: int) -> Block:
        v, full = _cosines(h, d), a.block(t, h)
        own = full[:h, s:]
        outputs = np.hstack([full[:h, :s], own @ v])
        states = np.hstack([full[h:, :s], full[h:, s:] @ v])
        u, triangle = np.linalg.qr(outputs)
        if a.is_toeplitz:
            rest = _rest(own, u, v)
        else:
            if h not in polar:
                left, _, right = linalg.svd(own)
                polar[h] = left @ right
            rest = float(np.vdot(polar[h], own) - linalg.svdvals(u.T @ own).sum())
        return Block(triangle, states, max(0.0, rest))

    cached = cache(lambda h, d: block(0, h, d))
    return (lambda t, h, d: cached(h, d)) if a.is_toeplitz else block


def _rest(own: Array, u: Array, v: Array) -> float:
    """Return nu = |(1 - U U^T) A_i (1 - V V^T)|_*."""
    rest = own - (own @ v) @ v.T
    return float(linalg.svdvals(rest - u @ (u.T @ rest)).sum())
