"""Binary trees (Dwork et al. 2010; Chan et al. 2011; Honaker 2015) as square causal strategies.

A tree releases noisy sums of all complete dyadic blocks of steps, fewer than 2n of them, and
estimates every prefix sum from these. Only the estimates are of use, and each step brings one more:
so an estimator is a lower-triangular map from one fresh normal a step to the noise of gradients.
Its state is the noise A_h of the complete left siblings of the blocks around step t, log2(n) rows.
Where t ends in g binary ones, blocks of 1, 2, ..., 2^(g-1) steps have just ended before it, and

    w_t = sigma_t z_t - sum_h f_{t,h} A_h,     then  A_g <- w_t + A_0 + ... + A_{g-1}.

- "naive" adds up the noise of the fewest blocks: sigma = 1, and f = 1 for h < g.
- "online", Honaker's estimate from below, weighs a block's own noise and that of its children by
  their variances; V_h = 1 / (2 - 2^-h) is that of the estimate.
- "full" has the Gram matrix of the whole tree, so it has the errors of the best linear estimator,
  which looks at later blocks too: the noise is drawn given its past.

For the first two X = C^T C is at most the Gram matrix of the tree, because they release less. For
"online" it is smaller: the sensitivity is below the tree's sqrt(log2(n) + 1), the error 7 % lower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootnoise._check import Array, RootnoiseError, integer
from rootnoise.causal import series
from rootnoise.causal.base import MAPS, CausalMatrix
from rootnoise.causal.momentum import Descent

Steps = NDArray[np.int64]

ESTIMATORS = ("full", "online", "naive")


@MAPS.add("tree")
@dataclass(frozen=True, eq=False)
class Tree(CausalMatrix):
    """The strategy C whose inverse turns fresh normals into the gradient noise of a binary tree.

    Args:
        n_steps: steps n; blocks that n cuts off are left out.
        estimator: "full", "online" or "naive".

    Raises:
        RootnoiseError: n_steps < 1, or another estimator.

    >>> Tree(2, "naive").inverse().dense()
    array([[ 1.,  0.],
           [-1.,  1.]])
    """

    n_steps: int
    estimator: str = "full"

    is_toeplitz = False

    def __post_init__(self) -> None:
        integer("n_steps", self.n_steps, 1)
        if self.estimator not in ESTIMATORS:
            raise RootnoiseError(
                f"estimator must be one of {', '.join(ESTIMATORS)}, got {self.estimator!r}"
            )

    @property
    def bands(self) -> int:
        return self.n_steps

    @property
    def state_size(self) -> int:
        return self.n_steps.bit_length() - 1

    def apply(self, x: Array) -> Array:
        return self._whole(x, forward=True)

    def solve(self, y: Array) -> Array:
        return self._whole(y, forward=False)

    def block(self, t: int, m: int) -> Array:
        s = self.state_size
        unit = np.eye(s + m)
        state = unit[:s].copy()
        return np.vstack([self._run(t, state, unit[s:], forward=True), state])

    def column_norms(self) -> Array:
        t = np.arange(self.n_steps)
        height = _heights(t, self.n_steps)
        if self.estimator == "full":
            return np.asarray(np.sqrt(1.0 + height))
        scales, feedback = self._table
        squares = scales[_trailing_ones(t)] ** -2.0
        for h in range(self.state_size):
            # The noise of step t is used once more when the right sibling of its block of 2^h ends.
            left = np.flatnonzero((t >> h & 1 == 0) & (h < height))
            g = _trailing_ones(t[left] | (2 << h) - 1)
            squares[left] += (feedback[g, h] / scales[g]) ** 2
        return np.asarray(np.sqrt(squares))

    def decoder_row_norms(self, workload: CausalMatrix) -> Array | None:
        """Return the errors of SGD under the noise of this tree: see `error_variances`."""
        sgd = workload.sgd if isinstance(workload, Descent) else None
        return None if sgd is None else np.sqrt(error_variances(self.n_steps, self.estimator, *sgd))

    def _whole(self, x: Array, *, forward: bool) -> Array:
        columns = x.reshape(self.n_steps, -1)
        state = np.zeros((self.state_size, columns.shape[1]))
        return self._run(0, state, columns, forward=forward).reshape(x.shape)

    def _run(self, t: int, state: Array, x: Array, *, forward: bool) -> Array:
        """Return z of the noise x, or the noise of normals x, from step t on; move the state."""
        steps = np.arange(t, t + len(x))
        scales, feedback = self._settings(steps)
        result = np.empty_like(x)
        for i, ones in enumerate(_trailing_ones(steps)):
            past = feedback[i] @ state
            result[i] = (x[i] + past) / scales[i] if forward else scales[i] * x[i] - past
            if ones < len(state):
                state[ones] = (x[i] if forward else result[i]) + state[:ones].sum(axis=0)
        return result

    def _settings(self, t: Steps) -> tuple[Array, Array]:
        """Return sigma_t and f_{t,h}, shapes (m,) and (m, s)."""
        if self.estimator != "full":
            scales, feedback = self._table
            return scales[_trailing_ones(t)], feedback[_trailing_ones(t)]
        # Down from the root, with the steps to come integrated out: given the past, the sum s of
        # t's block has log-density -above (s + f A)^2 / 2, and -s^2 / 2 more for its own release.
        height, precision = _heights(t, self.n_steps), np.ones(t.size)
        feedback = np.zeros((t.size, self.state_size))
        for h in range(self.state_size - 1, -1, -1):
            inside, right = h < height, t >> h & 1 == 1
            free = 1 / _variance(h)  # of the right sibling, where t is on the left
            above = np.where(right, precision, precision * free / (precision + free))
            feedback[inside & right, h] = 1.0
            feedback[inside] *= (above / (1 + above))[inside, np.newaxis]
            precision = np.where(inside, 1 + above, precision)
        return precision**-0.5, feedback

    @cached_property
    def _table(self) -> tuple[Array, Array]:
        """Sigma and f by the number of trailing ones of t, where they depend on nothing else."""
        s = self.state_size
        online = self.estimator == "online"
        children = np.array([online / (1 + 2 * _variance(h)) for h in range(s)])
        fresh, feedback = np.ones(s + 1), np.zeros((s + 1, s))
        for h, weight in enumerate(children):
            fresh[h + 1] = weight**2 * fresh[h] + (1 - weight) ** 2
            feedback[h + 1, : h + 1] = 1 - np.cumprod(children[h::-1])[::-1]
        return np.sqrt(fresh), feedback


def error_variances(
    n_steps: int, estimator: str = "full", momentum: float = 0.0, decay: float = 1.0
) -> Array:
    """Return the variance of every iterate's error under SGD, shape (n,), in O(n log n).

    Args:
        n_steps: steps n; each block of the tree has noise of variance 1.
        estimator: see `Tree`.
        momentum: beta in [0, 1); 0 with decay 1 are prefix sums.
        decay: alpha in (0, 1].

    >>> error_variances(4, "naive")
    array([1., 1., 2., 1.])
    """
    free_run = _FreeRun(n_steps, momentum, decay)
    if estimator == "full":
        return _full_variances(free_run)
    # Complete blocks that make up the past are independent, whatever comes after them.
    t, total = np.arange(n_steps), np.zeros(n_steps)
    for h, covariance in zip(
        free_run.levels, _covariances(free_run, online=estimator == "online"), strict=False
    ):
        after = np.flatnonzero(t + 1 >> h & 1)
        total[after] += free_run.variance(t[after] + 1 & (1 << h) - 1, covariance)
    return total


class _FreeRun:
    """The free run of SGD, its steps without noise: m' = beta m, y' = alpha y + m'."""

    def __init__(self, n_steps: int, momentum: float, decay: float):
        self.n_steps, self.levels = n_steps, range(n_steps.bit_length())
        self._momentum = momentum
        # After d steps y has become alpha^d y + beta a_{d-1} m.
        of_m = momentum * series.sgd_power(decay, momentum, 1.0, n_steps)
        self._ahead = np.stack([np.power(decay, np.arange(n_steps + 1.0)), np.append(0.0, of_m)])

    def mean(self, d: Steps, state: Array) -> Array:
        """Return y after d steps from one state, shape (2,)."""
        return np.asarray(state @ self._ahead[:, d])

    def variance(self, d: Steps, covariance: Array) -> Array:
        """Return the variance of y after d steps from a state of this covariance."""
        y, m = self._ahead[:, d]
        (yy, ym), (_, mm) = covariance
        return np.asarray(yy * y**2 + 2 * ym * y * m + mm * m**2)

    def matrix(self, d: int) -> Array:
        """Return the map of d steps, shape (2, 2)."""
        y, m = self._ahead[:, d]
        return np.array([[y, m], [0.0, self._momentum**d]])


def _full_variances(free_run: _FreeRun) -> Array:
    n = free_run.n_steps
    t, height = np.arange(n), _heights(np.arange(n), n)
    # Given the sum s of its block of 2^h steps, y has mean share * s and variance rest.
    share, rest, before = np.ones(n), np.zeros(n), np.zeros(n)
    for h, (mean, covariance) in zip(free_run.levels, _given_sums(free_run), strict=False):
        inside, left = h < height, np.zeros(n)
        right = np.flatnonzero(inside & (t >> h & 1 == 1))
        after = (t[right] & (1 << h) - 1) + 1
        left[right] = free_run.mean(after, mean)
        rest[right] += free_run.variance(after, covariance)
        rest += np.where(inside, (share - left) ** 2 * _variance(h) / 2, 0.0)
        share = np.where(inside, (share + left) / 2, share)
        if n >> h & 1:
            late = np.flatnonzero(h > height)
            whole = covariance + _variance(h) * np.outer(mean, mean)
            before[late] += free_run.variance(t[late] + 1 - (n >> h << h), whole)
    return np.asarray(before + share**2 * _variance(height) + rest)


def _given_sums(free_run: _FreeRun) -> Iterator[tuple[Array, Array]]:
    """Yield mean and covariance of (y, m) after a block of 2^h steps whose sum is 1."""
    mean, covariance = np.ones(2), np.zeros((2, 2))
    for h in free_run.levels:
        yield mean, covariance
        f = free_run.matrix(min(1 << h, free_run.n_steps))  # beyond n_steps nothing is used
        gap = f @ mean - mean
        covariance = f @ covariance @ f.T + covariance + np.outer(gap, gap) * _variance(h) / 2
        mean = (f @ mean + mean) / 2


def _covariances(free_run: _FreeRun, *, online: bool) -> Iterator[Array]:
    """Yield the covariance of (y, m) after a block of 2^h steps that was estimated from below."""
    # Of (y, m, e), with e the estimate: a block's last step adds theta (own - left - right).
    joint = np.ones((3, 3))
    for h in free_run.levels:
        yield joint[:2, :2]
        theta = 1 - online / (1 + 2 * _variance(h))
        late = np.eye(3)
        late[:, 2] -= theta
        early = late.copy()
        early[:2, :2] = free_run.matrix(min(1 << h, free_run.n_steps))
        joint = early @ joint @ early.T + late @ joint @ late.T + theta**2


def cycle_squares(n_steps: int, period: int) -> Array:
    """Return the squared norm of tree @ 1 over i, i + period, ... for each i, in O(n log n).

    It sums, over all blocks, the square of how many of these steps the block has.

    >>> cycle_squares(4, 2)
    array([8., 8.])
    """
    b, t, total = min(period, n_steps), np.arange(n_steps), np.zeros(min(period, n_steps))
    for h in range(n_steps.bit_length()):
        count = n_steps >> h
        whole = t[: count << h]
        if 1 << h <= b:  # at most one step of each cycle
            total += np.bincount(whole % b, minlength=b)
        else:
            taken = np.bincount(whole % b * count + (whole >> h), minlength=b * count)
            total += np.square(taken.reshape(b, count)).sum(axis=1)
    return total


def most_squares(n_steps: int, min_sep: int, k: int) -> float:
    """Return an upper bound on this squared norm for any k steps at least `min_sep` apart.

    A block of 2^h steps has at most ceil(2^h / b) of them, and all blocks of this size at most k.

    >>> most_squares(4, 2, 2)
    8.0
    """
    total = 0
    for h in range(n_steps.bit_length()):
        each = min(k, -(-(1 << h) // min_sep))
        full, rest = divmod(k, each)
        blocks = n_steps >> h
        total += blocks * each**2 if full >= blocks else full * each**2 + rest**2
    return float(total)


def _variance(h: Any) -> Any:
    """Return the variance of a block of 2^h steps, estimated from its own tree: 1, 2/3, 4/7, ..."""
    return 1 / (2 - 0.5**h)


def _heights(t: Steps, n: int) -> Steps:
    """Return the height of each step's largest complete block: the first bit n and t differ in."""
    return np.asarray(np.frexp(t ^ n)[1] - 1, dtype=np.int64)


def _trailing_ones(t: Steps) -> Steps:
    return np.asarray(np.frexp(~t & (t + 1))[1] - 1, dtype=np.int64)
