"""Chains of log-normals to test with, their products, and their deltas by quadrature."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import norm

from rootnoise.accounting.bin_chain import Chain


def gram_of(chain: Chain) -> np.ndarray:
    """Return the products, from what each mean takes of each Z."""
    moving, q = chain.bins - chain.still, len(chain.heads)
    i = np.arange(moving)
    takes = np.zeros((moving, moving // q + 2))
    takes[i, i // q] = np.array(chain.heads)[i % q]
    takes[i, i // q + 1] = np.array(chain.tails)[i % q]
    j = np.arange(takes.shape[1])
    whole = np.zeros((chain.bins, chain.bins))
    whole[:moving, :moving] = takes @ chain.decay ** np.abs(j - j[:, None]).astype(float) @ takes.T
    whole[i, i] += np.array(chain.alone)[i % q]
    return whole


def quadrature(chain: Chain, epsilon: float) -> tuple[float, float]:
    """Integrate both directions over the space of the means that are not 0."""
    moving = chain.bins - chain.still
    gram = gram_of(chain)[:moving, :moving]
    means = np.linalg.cholesky(gram)
    axis = np.linspace(-8, 8, {1: 20_001, 2: 501, 3: 101}[moving])
    grid = np.stack(np.meshgrid(*[axis] * moving, indexing="ij"))
    weight = np.prod(norm.pdf(grid), axis=0) * (axis[1] - axis[0]) ** moving
    logs = np.tensordot(means, grid, 1) - np.diag(gram).reshape(-1, *[1] * moving) / 2
    ratio, e = (np.exp(logs).sum(axis=0) + chain.still) / chain.bins, math.exp(epsilon)
    return float((np.maximum(ratio - e, 0) * weight).sum()), float(
        (np.maximum(1 - e * ratio, 0) * weight).sum()
    )


SMALL = [
    Chain.plain(2, 0.8, 0.6, 0.4),
    Chain.plain(2, 1.0, 0.3),
    Chain.plain(3, 0.5, 0.8, 0.5),
    Chain(2, (0.8,), (0.8,), (0.3,), 0.0),
    Chain(3, (0.9, 0.6), (0.3, 0.7), (0.4, 0.3), 0.0),
    Chain(3, (0.5,), (0.6,), (0.2,), 0.5),
]


STILL = [
    Chain.plain(3, 0.8, 0.6, 0.4, still=1),
    Chain(3, (0.9, 0.6), (0.3, 0.7), (0.4, 0.3), 0.0, still=1),
    Chain(3, (0.9, 0.6), (0.3, 0.7), (0.0, 0.3), 0.0, still=2),
]
