"""Workloads that treat every step alike: SGD, and any lower-triangular Toeplitz matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from rootnoise._check import Array, RootnoiseError, integer, real, set_fields, vector
from rootnoise.causal import CausalMatrix, Toeplitz, series
from rootnoise.causal.momentum import Descent
from rootnoise.workload.base import WORKLOADS, Workload


@WORKLOADS.add("sgd")
@dataclass(frozen=True)
class SGD(Workload):
    """SGD with momentum and decay: m <- momentum m + g, theta <- decay theta - lr m (lr = 1 here).

    The coefficients are a_j = (alpha^(j+1) - beta^(j+1)) / (alpha - beta) (Kalinin & Lampert
    2024), computed without that division. Prefix sums are momentum 0 and decay 1.

    Args:
        n_steps: steps n.
        momentum: beta in [0, 1).
        decay: alpha in (0, 1], the factor on the parameters at each step; 1 is no decay.

    Raises:
        RootnoiseError: a value outside its range.

    >>> SGD(4, momentum=0.5).matrix.column(0)
    array([1.   , 1.5  , 1.75 , 1.875])
    """

    n_steps: int
    momentum: float = 0.0
    decay: float = 1.0

    def __post_init__(self) -> None:
        # Plain Python numbers, so that equal workloads have equal JSON and fingerprints.
        set_fields(
            self,
            n_steps=integer("n_steps", self.n_steps, 1),
            momentum=real("momentum", self.momentum, at_least=0, below=1),
            decay=real("decay", self.decay, above=0, at_most=1),
        )

    @cached_property
    def matrix(self) -> CausalMatrix:
        return Toeplitz(
            series.sgd_power(self.decay, self.momentum, 1.0, self.n_steps), self.n_steps
        )

    @property
    def recurrence(self) -> CausalMatrix:
        return Descent(np.ones(self.n_steps), self.momentum, decay=self.decay)

    def square_root(self, size: int) -> Array:
        return series.sgd_power(self.decay, self.momentum, 0.5, size)

    def _contracted(self, contraction: float) -> Workload:
        # The velocity does not contract, only what it has moved.
        factor = float(np.exp(-contraction / self.n_steps))
        return SGD(self.n_steps, self.momentum, self.decay * factor)


@WORKLOADS.add("toeplitz", coefficients=list)
@dataclass(frozen=True, eq=False)
class ToeplitzWorkload(Workload):
    """Any lower-triangular Toeplitz workload, from its first column a of shape (n_steps,).

    Raises:
        RootnoiseError: NaN coefficients, or a first one that is not positive (A has no square
            root).

    >>> ToeplitzWorkload([4.0, 4.0]).square_root(2)
    array([2., 1.])
    """

    coefficients: ArrayLike

    def __post_init__(self) -> None:
        # Built here, not on first use, so that a bad one is refused where it is made.
        given = np.atleast_1d(np.asarray(self.coefficients))
        integer("n_steps", given.size, 1)
        a = vector("coefficients", given)
        if a[0] < 0:
            raise RootnoiseError(f"coefficients must start with a positive one, got {a[0]}")
        set_fields(self, coefficients=a, n_steps=a.size, _matrix=Toeplitz(a, a.size))

    @property
    def matrix(self) -> CausalMatrix:
        matrix: Toeplitz = self.__dict__["_matrix"]
        return matrix

    def square_root(self, size: int) -> Array:
        return series.sqrt(self.matrix.column(0), size)

    def _contracted(self, contraction: float) -> Workload:
        n = self.n_steps
        return ToeplitzWorkload(self.matrix.column(0) * np.exp(-contraction / n * np.arange(n)))


def prefix_sum(n_steps: int) -> SGD:
    """Return the workload of plain SGD, all prefix sums of the gradients.

    >>> prefix_sum(3).matrix.dense()
    array([[1., 0., 0.],
           [1., 1., 0.],
           [1., 1., 1.]])
    """
    return SGD(n_steps)
