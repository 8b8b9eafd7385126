"""The worst person found by search: a lower bound on the sensitivity, also for vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import oracle
from rootnoise.participation import FixedCycle, MinSeparation

Array = NDArray[np.float64]


def worst(strategy: Array, who: FixedCycle | MinSeparation, seed: int = 0) -> float:
    """Try every pattern with every sign, and with random unit vectors improved in turn."""
    b, k, fixed = who.min_sep, who.max_participations, isinstance(who, FixedCycle)
    best = oracle.sensitivity(strategy, b, k, fixed)
    generator = np.random.default_rng(seed)
    gram = strategy.T @ strategy
    for pattern in oracle.patterns(len(strategy), b, k, fixed):
        x = gram[np.ix_(pattern, pattern)]
        u = generator.standard_normal((len(pattern), len(pattern)))
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        for _ in range(20):
            for t in range(len(pattern)):
                pull = x[t] @ u - x[t, t] * u[t]
                u[t] = pull / (np.linalg.norm(pull) or 1.0) if pull.any() else u[t]
        best = max(best, float(np.sqrt(np.sum(x * (u @ u.T)))))
    return best
