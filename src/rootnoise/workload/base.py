"""The interface of a workload."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from rootnoise._check import Array, real
from rootnoise._files import Kinds
from rootnoise.causal import CausalMatrix, Toeplitz


class Workload(ABC):
    """A lower-triangular n x n workload matrix A."""

    n_steps: int

    @property
    @abstractmethod
    def matrix(self) -> CausalMatrix:
        """The matrix A."""

    @abstractmethod
    def square_root(self, size: int) -> Array:
        """Return the first `size` coefficients of the lower-triangular C with C C = A."""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description, read back by `from_dict`."""
        return WORKLOADS.to_dict(self)

    def root(self, bands: int) -> CausalMatrix:
        """Return the first `bands` diagonals of the C with C C = A, as a matrix."""
        return Toeplitz(self.square_root(bands), self.n_steps)

    @property
    def root_is_exact(self) -> bool:
        """Whether C C = A exactly: the root of a `neighbour` is only close to it."""
        return True

    def contracted(self, contraction: float) -> Workload:
        """Return the workload on a loss of curvature, which pulls the parameters back.

        At each step they keep exp(-c / n) of what they have moved (with a schedule in proportion to
        its rate), c = contraction: at the end the first step is forgotten but for exp(-c).

        Raises:
            RootnoiseError: a contraction below 0.
        """
        if real("contraction", contraction, at_least=0) == 0:
            return self
        return self._contracted(contraction)

    @abstractmethod
    def _contracted(self, contraction: float) -> Workload:
        """Return the workload of a contraction above 0."""

    @property
    def neighbour(self) -> Workload:
        """The Toeplitz workload that Toeplitz strategies are made for: itself if it is one."""
        return self

    @property
    def recurrence(self) -> CausalMatrix:
        """The matrix A again, in the form that streams with the smallest known state."""
        return self.matrix


WORKLOADS: Kinds[Workload] = Kinds("workload must be of a known type")
