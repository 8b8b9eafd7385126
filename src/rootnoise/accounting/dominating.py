"""|C|, whose privacy loss bounds that of C where a person's steps are random.

Let pattern pi have probability w_pi, whatever the data and the outputs, and let a person's
gradients x_s, |x_s| <= 1, depend on all outputs before step s. In units of the noise the likelihood
ratio of the run against one without that person is L = sum_pi w_pi E_pi, where E_pi is the
exponential martingale of increments mu_pi,t = sum_{s in pi} C_ts x_s that are known before step t.
For any convex f, E_Q f(L) is largest when the increments are m_pi,t = sum_{s in pi} |C|_ts:

    d/dr E f(sum_pi w_pi e_pi(r)) = 1/2 sum_{pi,pi'} (Sigma' - Sigma)_{pi,pi'} E[f'' w w' e e'] >= 0

on the path of covariances (1 - r) Sigma + r Sigma' of one step, since <mu_pi,t, mu_pi',t> <=
m_pi,t m_pi',t for every pair (Kahane 1985, "Sur le chaos multiplicatif", Lemma 1), with the e_pi
multiplied by what the remaining steps give; by induction from the last step. Both directions of
the hockey-stick divergence are such f. A person with constant gradients reaches it where C >= 0, so
that the pair is exact there, and only a bound where C has negative entries.
"""

from __future__ import annotations

import numpy as np

from rootnoise._check import RootnoiseError
from rootnoise.causal import CausalMatrix, Dense, Diagonal, Product, Toeplitz

# A dense strategy of so many steps has 0.5 GB.
DENSE = 8192


def magnitudes(strategy: CausalMatrix) -> CausalMatrix:
    """Return |C|, entry by entry.

    Scaled columns or rows, as of epoch-scaled strategies, are scaled magnitudes: |T D| = |T| |D|.

    Raises:
        RootnoiseError: a strategy that is neither Toeplitz nor one of these, and too long to look
            at every entry.
    """
    if strategy.coefficients is not None:
        return Toeplitz(np.abs(strategy.coefficients), strategy.n_steps)
    if isinstance(strategy, Diagonal):
        return Diagonal(np.abs(strategy.entries))
    if isinstance(strategy, Product) and any(
        isinstance(factor, Diagonal) for factor in (strategy.left, strategy.right)
    ):
        return Product(magnitudes(strategy.left), magnitudes(strategy.right))
    if strategy.n_steps > DENSE:
        raise RootnoiseError(
            f"n_steps must be at most {DENSE} where steps are random and the strategy is neither "
            f"Toeplitz nor scaled so, got {strategy.n_steps}"
        )
    return Dense(np.abs(strategy.dense()))
