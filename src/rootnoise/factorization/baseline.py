"""The two trivial factorizations: all noise on the input, or all on the output."""

from __future__ import annotations

import numpy as np

from rootnoise.causal import Toeplitz
from rootnoise.factorization.base import Factorization, register
from rootnoise.participation import Participation
from rootnoise.workload import Workload


@register("identity")
def identity(workload: Workload, participation: Participation) -> Factorization:
    """A = A Id: independent noise on every gradient, as DP-SGD adds it (Abadi et al. 2016)."""
    unit = Toeplitz(np.ones(1), workload.n_steps)
    return Factorization("identity", workload, unit, known_decoder=workload.matrix)


@register("workload")
def output(workload: Workload, participation: Participation) -> Factorization:
    """A = Id A: independent noise on every iterate (output perturbation)."""
    unit = Toeplitz(np.ones(1), workload.n_steps)
    return Factorization("workload", workload, workload.matrix, known_decoder=unit)
