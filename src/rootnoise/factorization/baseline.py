"""The two trivial factorizations: all noise on the input, or all on the output."""

from __future__ import annotations

import numpy as np

from rootnoise.causal import Toeplitz
from rootnoise.factorization.base import Factorization, register
from rootnoise.participation import Participation
from rootnoise.workload import SGD, Workload


@register("identity")
def identity(workload: Workload, participation: Participation) -> Factorization:
    """A = A Id: independent noise on every gradient, as DP-SGD adds it (Abadi et al. 2016)."""
    unit = Toeplitz(np.ones(1), workload.n_steps)
    return Factorization("identity", workload, unit, known_decoder=workload.matrix)


@register("workload")
def output(workload: Workload, participation: Participation) -> Factorization:
    """A = Id A: independent noise on every iterate (output perturbation)."""
    n = workload.n_steps
    unit = Toeplitz(np.ones(1), n)
    strategy = workload.matrix
    if isinstance(workload, SGD) and n > 2:
        # The same map as the inverse of (1 - alpha x)(1 - beta x): it streams in two rows, not n,
        # and without the cancellation that costs float32 its last three digits.
        alpha, beta = workload.decay, workload.momentum
        strategy = Toeplitz(np.array([1.0, -(alpha + beta), alpha * beta]), n).inverse()
    return Factorization("workload", workload, strategy, known_decoder=unit)
