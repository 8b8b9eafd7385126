"""HOW WRONG the iterates are: expected approximation error (not exceptions) at noise multiplier 1.

The error of step t is (B Z)_t with Z of standard deviation sens, so it has standard deviation
sens * |row t of B| in every coordinate (Kalinin & Lampert 2024; their E is `rmse`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rootnoise.causal import CausalMatrix


def per_step(decoder: CausalMatrix, sensitivity: float) -> NDArray[np.float64]:
    """Return the standard deviation of the error of each step, shape (n,)."""
    return sensitivity * decoder.row_norms()


def rmse(decoder: CausalMatrix, sensitivity: float) -> float:
    """Return sens * |B|_F / sqrt(n), the root of the mean squared error over the steps.

    >>> from rootnoise.workload import prefix_sum
    >>> rmse(prefix_sum(3).matrix, sensitivity=1.0) == 2**0.5
    True
    """
    return float(np.sqrt(np.mean(np.square(per_step(decoder, sensitivity)))))


def max_error(decoder: CausalMatrix, sensitivity: float) -> float:
    """Return sens * the largest row norm of B, the error of the worst step."""
    return float(per_step(decoder, sensitivity).max())
