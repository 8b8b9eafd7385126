"""Buffered linear Toeplitz matrices: a few exponentials, with one row of state each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import eigvalsh, toeplitz
from scipy.signal import lfilter

from rootnoise._check import Array, RootnoiseError, integer, set_fields, vector
from rootnoise.causal import series
from rootnoise.causal.base import MAPS, CausalMatrix


@MAPS.add("buffered", n_steps=int, decays=list, weights=list)
@dataclass(frozen=True, eq=False)
class BufferedToeplitz(CausalMatrix):
    """The map with coefficients 1 and sum_i omega_i theta_i^(j-1); its state is one row a buffer.

    Args:
        decays: theta in (0, 1), shape (d,).
        weights: omega > 0 with sum omega / theta < 1, shape (d,).
        n_steps: steps n.

    Raises:
        RootnoiseError: values out of range, or not as many weights as decays.

    >>> BufferedToeplitz([0.5], [0.25], 4).coefficients
    array([1.    , 0.25  , 0.125 , 0.0625])
    """

    decays: Array
    weights: Array
    n_steps: int

    is_toeplitz = True

    def __post_init__(self) -> None:
        integer("n_steps", self.n_steps, 1)
        theta, omega = vector("decays", self.decays), vector("weights", self.weights)
        if theta.size != omega.size:
            raise RootnoiseError(
                f"decays and weights must be equally many, got {theta.size} and {omega.size}"
            )
        if theta.min() <= 0 or theta.max() >= 1:
            raise RootnoiseError(f"decays must be in (0, 1), got {theta.tolist()}")
        if omega.min() <= 0 or (omega / theta).sum() >= 1:
            raise RootnoiseError(
                "weights must be > 0 with sum(weights / decays) < 1, "
                f"got {omega.tolist()} with sum {(omega / theta).sum():g}"
            )
        order = np.argsort(-theta)
        set_fields(self, decays=theta[order], weights=omega[order])

    @cached_property
    def coefficients(self) -> Array:
        ages = np.arange(self.n_steps - 1.0)
        tail = np.zeros(ages.size)
        for theta, omega in zip(self.decays, self.weights, strict=True):
            tail += omega * np.exp(ages * np.log(theta))
        return series.checked(np.append(1.0, tail))

    @cached_property
    def zeros(self) -> Array:
        """The decays phi of C^-1, largest first, shape (d,)."""
        # The zeros of 1 + sum omega / (z - theta): eigenvalues of diag(theta) - omega 1^T.
        root = np.sqrt(self.weights)
        return np.asarray(1.0 - eigvalsh(np.diag(1.0 - self.decays) + np.outer(root, root)))

    def apply(self, x: Array) -> Array:
        y = x.astype(np.float64)
        for theta, omega in zip(self.decays, self.weights, strict=True):
            y += omega * lfilter([0.0, 1.0], [1.0, -theta], x, axis=0)
        return y

    def solve(self, y: Array) -> Array:
        x = y
        for theta, phi in zip(self.decays, self.zeros, strict=True):
            x = np.asarray(lfilter([1.0, -theta], [1.0, -phi], x, axis=0))
        return x

    @property
    def bands(self) -> int:
        return self.n_steps

    @property
    def state_size(self) -> int:
        return self.decays.size

    def block(self, t: int, m: int) -> Array:
        # From S: y_t = x_t + omega S_t, S_{t+1} = theta S_t + x_t in each buffer.
        powers = self.decays ** np.arange(m + 1)[:, np.newaxis]
        responses = powers[:m] * self.weights
        column = np.append(1.0, responses[: m - 1].sum(axis=1))
        within = toeplitz(column, np.zeros(m))
        return np.block([[responses, within], [np.diag(powers[m]), powers[m - 1 :: -1].T]])
