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

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootnoise._check import RootnoiseError, integer
from rootnoise.causal import CausalMatrix, Product, readable
from rootnoise.factorization.base import Factorization, register
from rootnoise.participation import Participation
from rootnoise.workload import Workload, prefix_sum

Array = NDArray[np.float64]
Steps = NDArray[np.int64]

ESTIMATORS = ("full", "online", "naive")


@readable("tree")
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
            # Step t is heard once more when the right sibling of its block of 2^h steps ends.
            left = np.flatnonzero((t >> h & 1 == 0) & (h < height))
            g = _trailing_ones(t[left] | (2 << h) - 1)
            squares[left] += (feedback[g, h] / scales[g]) ** 2
        return np.asarray(np.sqrt(squares))

    def to_dict(self) -> dict[str, Any]:
        return {"type": "tree", "n_steps": self.n_steps, "estimator": self.estimator}

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
            heard = feedback[i] @ state
            result[i] = (x[i] + heard) / scales[i] if forward else scales[i] * x[i] - heard
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
        """The settings by the number of trailing ones, where these are all that matters."""
        s = self.state_size
        online = self.estimator == "online"
        children = np.array([online / (1 + 2 * _variance(h)) for h in range(s)])
        fresh, feedback = np.ones(s + 1), np.zeros((s + 1, s))
        for h, weight in enumerate(children):
            fresh[h + 1] = weight**2 * fresh[h] + (1 - weight) ** 2
            feedback[h + 1, : h + 1] = 1 - np.cumprod(children[h::-1])[::-1]
        return np.sqrt(fresh), feedback


@register("tree")
def tree(
    workload: Workload, participation: Participation, estimator: str = "full"
) -> Factorization:
    """C^-1 = the noise of a binary tree (Honaker 2015), with log2(n) rows of memory.

    "full" has the error of the full-variance estimator, yet runs online; "online" is Honaker's own
    online form, and "naive" adds up the fewest blocks. See `Tree`.

    Raises:
        RootnoiseError: another estimator.
    """
    strategy = Tree(workload.n_steps, estimator)
    known = None
    if workload == prefix_sum(workload.n_steps):
        known = _PrefixDecoder(workload.recurrence, strategy.inverse(), estimator)
    return Factorization("tree", workload, strategy, known_decoder=known)


@dataclass(frozen=True, eq=False)
class _PrefixDecoder(Product):
    """Prefix sums of a tree's noise, of known variances."""

    estimator: str = "full"

    def row_norms(self) -> Array:
        return np.sqrt(prefix_variances(self.n_steps, self.estimator))


def prefix_variances(n_steps: int, estimator: str = "full") -> Array:
    """Return the variance of every prefix sum's noise, shape (n,), in O(n log n).

    Args:
        n_steps: steps n; each block of the tree has noise of variance 1.
        estimator: see `Tree`.

    >>> prefix_variances(4, "naive")
    array([1., 1., 2., 1.])
    """
    t = np.arange(n_steps)
    levels = range(n_steps.bit_length())
    if estimator != "full":
        sizes = [1.0 if estimator == "naive" else _variance(h) for h in levels]
        return sum((t + 1 >> h & 1) * sizes[h] for h in levels) + np.zeros(n_steps)
    # Given the sum s of its block of 2^h steps, a prefix has mean share * s and variance rest.
    height = _heights(t, n_steps)
    share, rest, before = np.ones(n_steps), np.zeros(n_steps), np.zeros(n_steps)
    for h in levels:
        inside, right = h < height, t >> h & 1 == 1
        rest += np.where(inside, np.where(right, 1 - share, share) ** 2 * _variance(h) / 2, 0.0)
        share = np.where(inside, (share + right) / 2, share)
        if n_steps >> h & 1:
            before += (h > height) * _variance(h)
    return np.asarray(before + share**2 * _variance(height) + rest)


def _variance(h: Any) -> Any:
    """Return the variance of a block of 2^h steps, estimated from its own tree: 1, 2/3, 4/7, ..."""
    return 1 / (2 - 0.5**h)


def _heights(t: Steps, n: int) -> Steps:
    """Return the height of each step's largest complete block: the first bit n and t differ in."""
    return np.asarray(np.frexp(t ^ n)[1] - 1, dtype=np.int64)


def _trailing_ones(t: Steps) -> Steps:
    return np.asarray(np.frexp(~t & (t + 1))[1] - 1, dtype=np.int64)
