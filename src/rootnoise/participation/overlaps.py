"""The worst pattern of one person's steps, where their columns overlap (bands > separation).

With X = C^T C the largest change is at most the sum of |X_st| over the pairs of a pattern, and just
that where contributions of signs u_t = +-1 turn every product positive. The strategy enters through
the diagonals X_{t-d,t} alone, which are found without an n x n array.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from rootnoise._check import Array
from rootnoise.causal import CausalMatrix

Ages = tuple[int, ...]

# Entries of the Gram diagonals that may be held at once: 128 MB.
MEMORY = 2**24
# Elementary steps of the dynamic programme, about a second.
WORK = 2**29
# A NumPy call costs as much as these many elements.
CALL = 1000
# Sums of products carry this relative error.
ROUNDING = 1e-12


def comb(x: Array, n: int, min_sep: int, k: int) -> Array:
    """Return sum_{j<k} of x moved down by jb, on n rounded up to a multiple of b, in O(n)."""
    rows = -(-n // min_sep)
    sums = np.cumsum(np.pad(x, (0, rows * min_sep - x.size)).reshape(rows, min_sep), axis=0)
    sums[k:] -= sums[:-k].copy()
    return sums.ravel()


def gram_diagonals(strategy: CausalMatrix, lags: Iterable[int]) -> Iterator[Array]:
    """Yield the diagonal X_{t-d,t} of C^T C for each lag d: its entry t of n, 0 for t < d."""
    n, p = strategy.n_steps, strategy.bands
    if strategy.coefficients is not None:
        c = strategy.coefficients
        for d in lags:
            diagonal = np.zeros(n)
            if d < c.size:
                # Column t of a Toeplitz map holds its first n - t coefficients.
                sums = np.cumsum(c[: c.size - d] * c[d:])
                diagonal[d:] = sums[np.minimum(np.arange(n - d, 0, -1), sums.size) - 1]
            yield diagonal
        return
    rows = strategy.by_diagonals()
    for d in lags:
        diagonal = np.zeros(n)
        diagonal[d:] = np.einsum("et,et->t", rows[d:, : n - d], rows[: p - d, d:])
        yield diagonal


def worst_cycle(strategy: CausalMatrix, period: int) -> tuple[float, bool] | None:
    """Return the largest sum of |X_st| over all cycles i, i + b, i + 2b, ..., and if it is reached.

    None where it would take too much memory.
    """
    n = strategy.n_steps
    rounds = -(-n // period)
    lags = range(0, strategy.bands, period)
    inputs = 1 if strategy.coefficients is not None else strategy.bands
    if len(lags) * n > MEMORY or inputs * n > 8 * MEMORY:
        return None
    # pairs[g, r, i]: the product of steps (r - g) b + i and r b + i.
    pairs = np.array(
        [
            np.pad(diagonal, (0, rounds * period - n)).reshape(rounds, period)
            for diagonal in gram_diagonals(strategy, lags)
        ]
    )
    sums = np.abs(pairs).sum(axis=1)
    totals = 2 * sums.sum(axis=0) - sums[0]
    worst = int(totals.argmax())
    signs = np.ones(rounds)
    reached = float(pairs[0, :, worst].sum())
    for r in range(1, rounds):
        before = signs[max(0, r - len(pairs) + 1) : r][::-1]
        linked = float(before @ pairs[1 : r + 1, r, worst])
        signs[r] = np.sign(linked) or 1.0
        reached += 2 * abs(linked)
    return float(totals[worst]), bool(reached >= totals[worst] * (1 - ROUNDING))


def worst_pattern(strategy: CausalMatrix, min_sep: int, most: int) -> tuple[float, bool] | None:
    """Return the largest sum of |X_st| over at most k steps b apart, and if it is reached.

    Dynamic programming over the latest step t and the ages of those earlier ones that still reach a
    step to come: none of them for bands <= 2b, in O(k n b). Then only neighbours in the pattern
    touch, and signs always exist; they do for non-negative products too, and for k = 2.

    None where it would take too much: the ages number about (p / b)^(p / b).
    """
    n, p, b, k = strategy.n_steps, min(strategy.bands, strategy.n_steps), min_sep, most
    oldest = p - 1 - b
    calls = k * (p - max(b, oldest + 1) + _count(oldest, b) * max(0, oldest - b + 1))
    if p * n > MEMORY or calls * (n + CALL) > WORK:
        return None
    far, lags = max(b, p), range(b, p)
    gains, *pairs = gram_diagonals(strategy, [0, *lags])
    reached = p <= 2 * b or k == 2 or all(pair.min() >= 0 for pair in pairs)
    links = {d: 2 * np.abs(pair) for d, pair in zip(lags, pairs, strict=True)}

    states = list(_ages(oldest, b))
    best = {ages: np.full(n, -np.inf) for ages in states}
    best[()] = gains
    total = gains.max()
    for _ in range(k - 1):
        at_best = np.maximum.reduce(list(best.values()))
        after = {ages: np.full(n, -np.inf) for ages in states}
        if far < n:  # out of reach of all before
            after[()][far:] = np.maximum.accumulate(at_best)[:-far]
        for gap in range(max(b, oldest + 1), p):  # within reach of the last step alone
            _raise(after[()], at_best, gap, links[gap])
        for ages, values in best.items():
            for gap in range(b, oldest + 1):
                reachable = [gap, *(age + gap for age in ages if age + gap < p)]
                kept = tuple(age for age in reachable if age <= oldest)
                link = np.sum([links[age] for age in reachable], axis=0)
                _raise(after[kept], values, gap, link)
        best = {ages: values + gains for ages, values in after.items()}
        total = max(total, *(values.max() for values in best.values()))
    return float(total), reached


def _raise(values: Array, before: Array, gap: int, link: Array) -> None:
    """Let each step t follow step t - gap where that is better."""
    np.maximum(values[gap:], before[:-gap] + link[gap:], out=values[gap:])


def _ages(oldest: int, b: int, youngest: int | None = None) -> Iterator[Ages]:
    """Yield all sets of ages up to `oldest` that are at least b and at least b apart."""
    yield ()
    for age in range(b if youngest is None else youngest, oldest + 1):
        yield from ((age, *rest) for rest in _ages(oldest, b, age + b))


def _count(oldest: int, b: int) -> int:
    """Return how many of these sets there are, but no more than WORK."""
    counts = [1] * max(1, b)
    for age in range(b, oldest + 1):
        counts.append(min(WORK, counts[age - 1] + counts[age - b]))
    return counts[max(0, oldest)]
