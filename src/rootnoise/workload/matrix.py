"""Any lower-triangular workload, given as an array."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from rootnoise._check import Array, RootnoiseError, set_fields
from rootnoise.causal import CausalMatrix, Dense
from rootnoise.workload.base import WORKLOADS, Workload
from rootnoise.workload.triangular import square_root


@WORKLOADS.add("matrix", entries=list)
@dataclass(frozen=True, eq=False)
class MatrixWorkload(Workload):
    """Any lower-triangular A with a positive diagonal, from an array of shape (n, n).

    Memory is O(n^2), and the square root takes O(n^3) time: 0.6 s for n = 2048.

    Raises:
        RootnoiseError: not square, NaN, not lower-triangular, or a diagonal not positive.

    >>> MatrixWorkload([[1.0, 0.0], [3.0, 4.0]]).root(bands=2).dense()
    array([[1., 0.],
           [1., 2.]])
    """

    entries: ArrayLike

    def __post_init__(self) -> None:
        dense = Dense(np.asarray(self.entries))
        diagonal = np.diag(dense.entries)
        if diagonal.min() < 0:
            i = int(np.argmin(diagonal))
            raise RootnoiseError(
                "matrix must have a positive diagonal to have a square root, "
                f"got {diagonal[i]:g} at ({i}, {i})"
            )
        set_fields(self, entries=dense.entries, n_steps=dense.n_steps, _matrix=dense)

    @property
    def matrix(self) -> CausalMatrix:
        matrix: Dense = self.__dict__["_matrix"]
        return matrix

    def _contracted(self, contraction: float) -> Workload:
        n = self.n_steps
        lags = np.subtract.outer(np.arange(n), np.arange(n)).clip(0)
        return MatrixWorkload(self.matrix.dense() * np.exp(-contraction / n * lags))

    def square_root(self, size: int) -> Array:
        """Refuse: the root is no Toeplitz matrix; see `root`."""
        return self.neighbour.square_root(size)

    @property
    def neighbour(self) -> Workload:
        """Refuse: a matrix has no Toeplitz neighbour.

        Raises:
            RootnoiseError: always.
        """
        raise RootnoiseError(
            "workload must be Toeplitz, or SGD with a schedule, for a Toeplitz strategy, "
            f"got a matrix of {self.n_steps} steps"
        )

    @cached_property
    def _root(self) -> Array:
        return square_root(self.matrix.dense())

    def root(self, bands: int) -> CausalMatrix:
        return Dense(np.triu(self._root, 1 - bands))
