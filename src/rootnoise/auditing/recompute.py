"""Sensitivity, epsilon and error by a second route that shares no formula with the first.

The strategy is read back from the map that the noise engine runs, C = (C^-1)^-1; the sensitivity is
searched for over patterns of its Gram matrix; epsilon comes from integrating the trade-off itself,
or from convolving discretised privacy losses rounded down and up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import fft, integrate, optimize, special, stats
from scipy.linalg import solve_triangular

from rootnoise._check import Array
from rootnoise.auditing.best_of import best_of
from rootnoise.causal import CausalMatrix
from rootnoise.mechanism import Mechanism
from rootnoise.participation import (
    BallsInBins,
    CyclicPoisson,
    FixedCycle,
    MinSeparation,
    MinSepPoisson,
    Participation,
)

# A grid, the mass of each loss on it, and the mass beyond.
Losses = tuple[Array, Array, float]

# The Gram matrix of so many steps is 18 MB; beyond, patterns are applied one by one.
DENSE = 1500
# All patterns are tried up to this number; beyond, the best found by ascent is a lower bound.
PATTERNS = 20_000
# Largest grid of a convolution, 64 MB as complex numbers.
GRID = 2**22
# Of the loss under balls in bins.
SAMPLES = 200_000
# The same under b-min-sep Poisson sampling: 0.1 s for 1000 with 1000 steps.
WALKS = 50_000


@dataclass(frozen=True)
class Range:
    """A number is known to lie in [low, high], up to rounding.

    Attributes:
        low: the largest value reached.
        high: the least upper bound, or infinity where none was computed.
        method: how.
    """

    low: float
    high: float
    method: str

    def holds(self, value: float, tolerance: float) -> bool:
        """Whether `value` lies in the range, up to a relative tolerance at either end."""
        return self.low * (1 - tolerance) <= value <= self.high * (1 + tolerance)


def streamed(matrix: CausalMatrix, x: Array, m: int = 16) -> Array:
    """Return M x for x of shape (n, d), m steps at a time through the blocks of the engine."""
    state = np.zeros((matrix.state_size, x.shape[1]))
    rows = []
    for t in range(0, len(x), m):
        part = x[t : t + m]
        both = matrix.block(t, len(part)) @ np.concatenate([state, part])
        rows.append(both[: len(part)])
        state = both[len(part) :]
    return np.concatenate(rows)


def strategy_of(mechanism: Mechanism) -> Array:
    """Return the dense C whose inverse the noise engine runs."""
    n = mechanism.n_steps
    return np.asarray(
        solve_triangular(streamed(mechanism.noising, np.eye(n)), np.eye(n), lower=True)
    )


def sensitivity_range(mechanism: Mechanism) -> Range:
    """Return what the sensitivity must lie in.

    Up to DENSE steps from the Gram matrix of `strategy_of`: at least the largest change of a person
    whose gradients are all alike or alternate as the signs of the Gram matrix, and at most the
    largest sum of magnitudes, over all patterns where they can be listed. Beyond, a lower bound.
    """
    participation, n = mechanism.participation, mechanism.n_steps
    if n > DENSE:
        return _long(mechanism)
    c = strategy_of(mechanism)
    gram = c.T @ c
    if _single(participation):
        column = math.sqrt(gram.diagonal().max())
        return Range(column, column, "columns of the map that the engine runs")
    assert isinstance(participation, FixedCycle | MinSeparation)  # noqa: S101
    listed = _patterns(participation, n)
    if listed is None:
        return Range(_ascent(gram, participation), math.inf, "ascent over patterns: a lower bound")
    patterns = list(listed)
    low = max(_aligned(gram[np.ix_(p, p)]) for p in patterns)
    high = max(float(np.abs(gram[np.ix_(p, p)]).sum()) for p in patterns)
    return Range(
        math.sqrt(low), math.sqrt(high), f"all {len(patterns)} patterns of the Gram matrix"
    )


def epsilon_ranges(mechanism: Mechanism, claimed: Mapping[float, float]) -> list[Range]:
    """Return what epsilon must lie in at each delta; the claimed epsilons only place the grid.

    Without sampling the trade-off of two Gaussians is integrated numerically. Under cyclic Poisson
    sampling the losses of one round are put on a grid, down and up, and convolved by FFT. Balls in
    bins lie between a lower confidence bound from plain samples of the loss, with the strategy that
    the engine runs, and the epsilon without amplification. Of the best of several trials the
    theorem is worked out again, from the integrated trade-off of one.
    """
    sigma, p = mechanism.noise_multiplier, mechanism.participation
    if mechanism.trials is not None:
        found = [best_of(mechanism.trials, 1 / sigma, delta, _integrated) for delta in claimed]
        return [Range(low, high, f"number of trials {mechanism.trials}") for low, high in found]
    if not isinstance(p, CyclicPoisson):
        whole = [_integrated(1 / sigma, delta) for delta in claimed]
        if isinstance(p, BallsInBins):
            low = _sampled(mechanism, p, list(claimed))
            method = f"between {SAMPLES} plain samples and no amplification"
            return [Range(a, b, method) for a, b in zip(low, whole, strict=True)]
        if isinstance(p, MinSepPoisson):
            often = math.sqrt(-(-mechanism.n_steps // p.min_sep))  # columns do not overlap
            whole = [_integrated(often / sigma, delta) for delta in claimed]
            low = _lower(_renewal_losses(mechanism, p), list(claimed))
            method = f"between {WALKS} plain samples and no amplification"
            return [Range(a, b, method) for a, b in zip(low, whole, strict=True)]
        return [Range(epsilon, epsilon, "numerical integration") for epsilon in whole]
    rounds = p.rounds(mechanism.n_steps)
    width = 2 * max(claimed.values()) + 40  # losses beyond it weigh nothing
    step = max(0.01 * min(claimed.values()) / rounds, 2 * width / GRID)
    lower, upper = (_convolved(sigma, p.probability, rounds, step, width, up) for up in (0, 1))
    return [
        Range(_epsilon_of(lower, delta), _epsilon_of(upper, delta), "losses rounded down and up")
        for delta in claimed
    ]


def poisson_deltas(participation: CyclicPoisson, n_steps: int, sigma: float, at: Array) -> Array:
    """Return upper bounds on delta at each epsilon of `at`: losses of up to 0.05 too large."""
    rounds, width = participation.rounds(n_steps), 3 * float(at.max())
    step = max(0.05 / rounds, 2 * width / GRID)
    found = np.zeros(len(at))
    for grid, mass, lost in _convolved(sigma, participation.probability, rounds, step, width, 1):
        tail = np.cumsum(mass[::-1])[::-1]
        damped = np.cumsum((mass * np.exp(-np.maximum(grid, 0.0)))[::-1])[::-1]
        i = np.searchsorted(grid, at, side="right")
        found = np.maximum(found, tail[i] - np.exp(at) * damped[i] + lost)
    return found


def rmse(mechanism: Mechanism) -> float:
    """Return sens |A C^-1|_F / sqrt(n) from the dense inverse that the engine runs."""
    n = mechanism.n_steps
    b = mechanism.workload.matrix.dense() @ streamed(mechanism.noising, np.eye(n))
    return mechanism.sensitivity.value * float(np.linalg.norm(b)) / math.sqrt(n)


# ------------------------------------------------------------------------------------ sensitivity


def _single(participation: Participation) -> bool:
    return getattr(participation, "max_participations", 1) == 1


def _patterns(participation: FixedCycle | MinSeparation, n: int) -> Iterator[list[int]] | None:
    """Yield all patterns that no other contains, or None where they are too many."""
    b, k = participation.min_sep, participation.max_participations
    if isinstance(participation, FixedCycle):
        return (list(range(i, n, b)) for i in range(min(b, n)))
    free = n - (k - 1) * (b - 1)  # close every gap by b - 1: k of the steps that remain
    if math.comb(free, k) > PATTERNS:
        return None
    spread = [j * (b - 1) for j in range(k)]
    return ([t + s for t, s in zip(p, spread, strict=True)] for p in combinations(range(free), k))


def _aligned(x: Array) -> float:
    """Return the larger |C u|^2 of two u: all ones, and the signs of the leading eigenvector."""
    signs = np.where(np.linalg.eigh(x)[1][:, -1] < 0, -1.0, 1.0)
    return max(float(x.sum()), float(signs @ x @ signs))


def _ascent(gram: Array, participation: FixedCycle | MinSeparation) -> float:
    """Return the best pattern found by moving one step of a pattern at a time, from many starts."""
    n, b, k = len(gram), participation.min_sep, participation.max_participations
    rng = np.random.default_rng(0)
    best = 0.0
    for start in range(24):
        slack = n - 1 - (k - 1) * b
        shifts = np.sort(rng.integers(0, slack + 1, k)) if start else np.zeros(k, dtype=np.int64)
        pattern = np.arange(k) * b + shifts
        value, before = float(gram[np.ix_(pattern, pattern)].sum()), -1.0
        while value > before * (1 + 1e-12):
            before = value
            for j in range(k):
                rest = np.delete(pattern, j)
                low = pattern[j - 1] + b if j else 0
                high = pattern[j + 1] - b if j < k - 1 else n - 1
                steps = np.arange(low, high + 1)
                gains = gram[steps, steps] + 2 * gram[np.ix_(steps, rest)].sum(1)
                pattern[j] = steps[int(np.argmax(gains))]
            value = float(gram[np.ix_(pattern, pattern)].sum())
        best = max(best, value)
    return math.sqrt(best)


def _long(mechanism: Mechanism) -> Range:
    """Apply C to some patterns and see that the engine's map takes the results back."""
    p, n = mechanism.participation, mechanism.n_steps
    b, k = getattr(p, "min_sep", n), 1 if _single(p) else p.max_participations  # type: ignore[union-attr]
    starts = sorted({0, (n - (k - 1) * b) // 2, b // 2, b - 1} & set(range(n)))
    u = np.zeros((n, len(starts)))
    for column, start in enumerate(starts):
        u[np.arange(start, n, b)[:k], column] = 1.0
    y = mechanism.strategy.apply(u)
    noising = mechanism.noising
    back = streamed(noising, y, 64) if noising.state_size <= DENSE else noising.apply(y)
    if not np.allclose(back, u, atol=1e-8):
        return Range(math.inf, math.inf, "the engine does not run the inverse of the strategy")
    low = float(np.linalg.norm(y, axis=0).max())
    return Range(low, math.inf, f"{len(starts)} patterns applied: a lower bound")


# ---------------------------------------------------------------------------------------- epsilon


def _integrated(mu: float, delta: float) -> float:
    """Return the epsilon at which E[(1 - exp(epsilon - loss))_+] is delta, loss of N(mu, 1)."""

    def excess(epsilon: float) -> float:
        edge = epsilon / mu + mu / 2  # where the loss mu x - mu^2 / 2 is epsilon
        # From the edge on, scaled by the density there: no term underflows.
        level = stats.norm.logpdf(edge, mu)

        def integrand(y: float) -> float:
            return math.exp(-y * (edge - mu) - y * y / 2) * -math.expm1(-mu * y)

        reach = max(mu - edge, 0.0) + 40 / max(1.0, edge - mu)
        area = integrate.quad(integrand, 0, reach, epsabs=0, epsrel=1e-12, limit=400)[0]
        return float(level + math.log(area)) - math.log(delta)

    high = 1.0
    while excess(high) > 0:
        high *= 2
    return float(optimize.brentq(excess, 1e-12, high, xtol=1e-14, rtol=1e-13))


def _sampled(mechanism: Mechanism, p: BallsInBins, deltas: list[float]) -> list[float]:
    """Return lower bounds on epsilon, each valid with probability 1 - 1e-6: removal, no tilting.

    A person falls into one of b bins and gives all ones; the release is (m_i + Z) / std.
    """
    n, b = mechanism.n_steps, p.period
    c = strategy_of(mechanism) if n <= DENSE else mechanism.strategy.dense()
    comb = (np.arange(n)[:, None] % b == np.arange(b)).astype(np.float64)
    means = c @ comb * mechanism.clip_norm / mechanism.noise_std
    root = np.asarray(
        np.linalg.qr(means, mode="r")
    )  # nothing is seen outside the span of the means
    rng = np.random.default_rng(1)
    half = np.square(root).sum(0) / 2
    losses = []
    for block in np.array_split(rng.integers(b, size=SAMPLES), max(1, SAMPLES * b // 2**22)):
        seen = root[:, block].T + rng.standard_normal((block.size, len(root)))
        losses.append(special.logsumexp(seen @ root - half, axis=1) - math.log(b))
    return _lower(np.concatenate(losses), deltas)


def _renewal_losses(mechanism: Mechanism, p: MinSepPoisson) -> Array:
    """Return losses of a person under b-min-sep Poisson sampling, who gives all ones.

    Forwards in time: of L, the part of the patterns that may join the next step, and the parts of
    those that joined one of the last b - 1 steps.
    """
    n, b, q = mechanism.n_steps, p.min_sep, p.probability
    c = strategy_of(mechanism) if n <= DENSE else mechanism.strategy.dense()
    c = c * mechanism.clip_norm / mechanism.noise_std
    half = np.square(c).sum(0)[:, None] / 2
    rng = np.random.default_rng(1)
    losses = []
    for block in np.array_split(np.arange(WALKS), max(1, WALKS * n // 2**21)):
        steps = np.zeros((n, block.size))
        ready = rng.choice(b, block.size, p=[p.rate / q] + [p.rate] * (b - 1))
        for t in range(n):
            joins = (ready <= t) & (rng.random(block.size) < q)
            steps[t] = joins
            ready = np.where(joins, t + b, ready)
        x = np.exp(c.T @ (c @ steps + rng.standard_normal(steps.shape)) - half)
        free, joined = np.full(block.size, p.rate / q), np.full((n + b, block.size), p.rate)
        for t in range(n):  # joined[t + b]: at step t; below b: before the first
            joined[t + b] = q * x[t] * free
            free = (1 - q) * free + joined[t + 1]
        losses.append(np.log(free + joined[n + 1 :].sum(axis=0)))
    return np.concatenate(losses)


def _lower(losses: Array, deltas: list[float]) -> list[float]:
    """Return lower confidence bounds on epsilon from samples of the loss."""
    # The probability of a loss above the k-th largest of N is Beta(k, N - k + 1): it exceeds `sure`
    # with probability 1 - 1e-6, for all ranks together. delta(eps) is at least
    # P(loss >= x) (1 - exp(eps - x)) for every x.
    size = losses.size
    ranks = np.unique(np.geomspace(3, size, 100).astype(np.int64))
    loss = np.sort(losses)[::-1][ranks - 1]
    sure = np.asarray(stats.beta.ppf(1e-6 / ranks.size, ranks, size - ranks + 1))
    bounds = (loss[sure > d] + np.log1p(-d / sure[sure > d]) for d in deltas)
    return [max(0.0, float(bound.max(initial=0.0))) for bound in bounds]


def _convolved(
    sigma: float, q: float, rounds: int, step: float, width: float, up: int
) -> list[Losses]:
    """Return the composed losses of both directions, each loss rounded down (0) or up (1)."""
    size = 2 ** math.ceil(math.log2(2 * width / step))
    grid = (np.arange(size) - size // 2) * step
    found = []
    for removed in (True, False):
        mass, beyond = _losses(sigma, q, grid, removed, up)
        total = fft.irfft(fft.rfft(np.roll(mass, -(size // 2))) ** rounds, size)
        total = np.maximum(np.roll(total, size // 2), 0.0)
        found.append((grid, total, rounds * beyond if up else 0.0))
    return found


def _losses(sigma: float, q: float, grid: Array, removed: bool, up: int) -> tuple[Array, float]:
    """Return the mass of one round at each grid point, and that beyond the last."""
    edges = grid if removed else -grid[::-1]
    # log(1 - q + q exp((2 x - 1) / (2 sigma^2))) = edge, solved for x: -inf below log(1 - q).
    inner = np.expm1(edges) / q + 1
    x = np.where(inner > 0, np.log(np.maximum(inner, 1e-300)) * sigma**2 + 0.5, -np.inf)
    if removed:
        below = (1 - q) * stats.norm.cdf(x / sigma) + q * stats.norm.cdf((x - 1) / sigma)
        above = (1 - q) * stats.norm.sf(x / sigma) + q * stats.norm.sf((x - 1) / sigma)
    else:
        below = stats.norm.sf(x / sigma)[::-1]
        above = stats.norm.cdf(x / sigma)[::-1]
    between = np.where(below[1:] < 0.5, np.diff(below), -np.diff(above))
    mass = np.zeros(grid.size)
    mass[up : up + between.size] += between
    mass[0] += below[0]
    if not up:
        mass[-1] += above[-1]
    return mass, float(above[-1])


def _epsilon_of(directions: list[Losses], delta: float) -> float:
    """Return the least epsilon >= 0 with sum of mass (1 - exp(epsilon - loss))_+ + lost <= delta.

    In the worse of the two directions.
    """
    return max(_smallest(*losses, delta) for losses in directions)


def _smallest(grid: Array, mass: Array, lost: float, delta: float) -> float:
    positive = grid >= 0
    loss, mass = grid[positive], mass[positive]
    tail = np.cumsum(mass[::-1])[::-1] + lost
    damped = np.cumsum((mass * np.exp(-loss))[::-1])[::-1]
    fits = np.flatnonzero(tail - np.exp(loss) * damped <= delta)
    if not fits.size:
        return math.inf
    i = int(fits[0])
    if i == 0:
        return 0.0
    # Between two grid points the same losses count, those from i on.
    return float(np.log((tail[i] - delta) / damped[i])) if tail[i] > delta else float(loss[i - 1])
