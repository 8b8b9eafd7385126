"""The best strategy with p bands, every entry free (BandMF, Choquette-Choo et al. 2023).

Where p is at most the separation, the columns of one person are orthogonal, and the sensitivity is
known from their norms alone. In a fixed cycle person i takes part in the steps i, i + b, i + 2b,
..., whose norms s_t are free but for sum s_t^2 = 1; under a minimum separation all steps of a
window of b share one, and the windows' squares sum to 1. So L-BFGS runs over the entries E in the
band and the logarithms of s before they are normalised; C is E with its columns scaled. The
objective is log |B|_F^2, B = A C^-1.

For a workload of small state |B|_F^2 comes block by block (`banded_energy.py`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rootnoise._check import Array, integer, real
from rootnoise.causal import CausalMatrix
from rootnoise.causal.banded import Banded
from rootnoise.factorization.banded_energy import Energy, energy
from rootnoise.factorization.base import (
    Factorization,
    Progress,
    Search,
    default_bands,
    register,
)
from rootnoise.factorization.lbfgs import lbfgs
from rootnoise.factorization.scaled import epoch_scaled
from rootnoise.participation import FixedCycle, MinSeparation, Participation
from rootnoise.workload import Workload

Indices = NDArray[np.intp]

LARGEST = 4096
MAX_ITERATIONS = 500


@register("bandmf")
def bandmf(
    workload: Workload,
    participation: Participation,
    bands: int | None = None,
    tolerance: float = 1e-6,
    progress: Progress | None = None,
) -> Factorization:
    """C = any p bands of least error (BandMF, Choquette-Choo et al. 2023), of any column norms.

    It is `banded` without the demand that the strategy be Toeplitz, and `epoch-scaled` with all
    its entries optimised, from which it starts. A stream is as cheap as that of any p bands.

    Args:
        workload: at most 4096 steps.
        participation: who may take part when.
        bands: p (default: the separation, or 32 for one participation), at most the separation.
        tolerance: the relative gain of an iteration at which to stop, over 100.
        progress: called with the number of iterations and the rmse.

    Raises:
        RootnoiseError: too many steps, bands beyond the separation, or a tolerance outside (0, 1).

    >>> from rootnoise.participation import SingleParticipation
    >>> from rootnoise.workload import prefix_sum
    >>> once = SingleParticipation()
    >>> round(bandmf(prefix_sum(100), once, bands=20).rmse(once), 3)
    2.506
    """
    n = integer("n_steps", workload.n_steps, 1, LARGEST)
    tolerance = real("tolerance", tolerance, above=0, below=1)
    separation = default_bands(n, participation)
    p = min(separation, 32 if separation == n else n)
    if bands is not None:
        p = integer("bands", bands, 1, separation, high_name=_limit(n, separation))

    def build(strategy: CausalMatrix) -> Factorization:
        return Factorization("bandmf", workload, strategy)

    search = Search(build, participation, progress)
    start = epoch_scaled(workload, participation, bands=p).strategy
    search(start)
    windows, people, repeats = _windows(n, participation)

    objective = _Objective(energy(workload, p), windows, people, (p, n))
    found = lbfgs(
        objective,
        objective.coordinates(start.by_diagonals(p)),
        ftol=tolerance / 100,
        gtol=0.0,
        most=MAX_ITERATIONS,
        report=lambda value: search.report_objective(value + np.log(repeats / n)),
    )
    search(Banded(objective.strategy(found)[0]))
    return search.best


def _limit(n: int, separation: int) -> str:
    return "n_steps" if separation == n else "separation"


def _windows(n: int, participation: Participation) -> tuple[Indices, Indices, int]:
    """Return each step's window, each window's person, and how often that person enters each.

    A window has one norm. With more windows than participations one would pick those of the largest
    norm: all are one.
    """
    match participation:
        case FixedCycle(b, k) if k > 1:
            return np.arange(n), np.arange(n) % b, 1
        case MinSeparation(b, k) if k > 1:
            if n <= k * b:
                return np.arange(n) // b, np.zeros(-(-n // b), np.intp), 1
            return np.zeros(n, np.intp), np.zeros(1, np.intp), k
    return np.zeros(n, np.intp), np.zeros(1, np.intp), 1


class _Objective:
    """2 log rmse, up to a constant, of log s and the entries in the band: see above."""

    def __init__(
        self, energy: Energy, windows: Indices, people: Indices, shape: tuple[int, int]
    ) -> None:
        self._energy, self._windows, self._people, self._shape = energy, windows, people, shape
        self._inside = np.add.outer(*map(np.arange, shape)) < shape[1]

    def coordinates(self, diagonals: Array) -> Array:
        """Return the coordinates of these diagonals, the norms of a window replaced by a mean."""
        norms = np.linalg.norm(diagonals, axis=0)
        means = np.bincount(self._windows, np.log(norms)) / np.bincount(self._windows)
        return np.append(means, (diagonals / norms)[self._inside])

    def strategy(self, u: Array) -> tuple[Array, Array, Array]:
        """Return the diagonals, what scaled each column, and s^2."""
        c, count = np.zeros(self._shape), self._people.size
        squares = np.exp(2 * u[:count])
        squares /= np.bincount(self._people, squares)[self._people]
        c[self._inside] = u[count:]
        scale = np.sqrt(squares)[self._windows] / np.linalg.norm(c, axis=0)
        return c * scale, scale, squares

    def __call__(self, u: Array) -> tuple[float, Array]:
        """Return the value and the gradient."""
        c, scale, squares = self.strategy(u)
        error, slope = self._energy(c)
        slope /= error
        along = (slope * c).sum(0)
        # Along a column lies the change of its window's norm; across, that of its direction.
        by_window = np.bincount(self._windows, along)
        of_norms = by_window - squares * np.bincount(self._people, by_window)[self._people]
        of_entries = (slope - c * (along / squares[self._windows])) * scale
        return float(np.log(error)), np.append(of_norms, of_entries[self._inside])
