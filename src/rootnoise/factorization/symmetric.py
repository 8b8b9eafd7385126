"""Symmetric workloads, answered OFFLINE: linear queries, where all data are there at once.

A = A^(1/2) A^(1/2) by eigen-decomposition is for a symmetric positive semi-definite A, and only for
one. It has nothing to do with SGD: an optimizer's A is lower-triangular, with another root, and a
symmetric C needs every step before it answers the first. Hence plain arrays here, no streaming.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import eigh, lstsq

from rootnoise._check import Array, RootnoiseError, integer, matrix

# Largest relative difference of B C from A for which B is accepted; typical ones are below 1e-13.
RESIDUAL = 1e-9


@dataclass(frozen=True, eq=False)
class OfflineFactorization:
    """A = B C: what is privatised is C X + Z, and B turns all of it into A X, once.

    One person is in one row of X. Errors are at noise multiplier 1, as everywhere.

    Attributes:
        strategy: C, shape (n, n).
        decoder: B, shape (n, n).
    """

    strategy: Array
    decoder: Array

    @property
    def sensitivity(self) -> float:
        """Return the largest column norm of C: exact, as one person is in one row of X."""
        return float(np.linalg.norm(self.strategy, axis=0).max())

    @property
    def rmse(self) -> float:
        """Return sens * |B|_F / sqrt(n); for the whole root max_i sqrt(A_ii) * sqrt(tr A / n)."""
        squares = np.square(self.decoder).sum(axis=1)
        return self.sensitivity * float(np.sqrt(squares.mean()))

    @property
    def max_error(self) -> float:
        """Return sens * the largest row norm of B; for the whole root max_i A_ii."""
        return self.sensitivity * float(np.linalg.norm(self.decoder, axis=1).max())

    @property
    def lower_bound(self) -> float:
        """Return tr A / n: no factorization of A has a smaller rmse.

        For `sens >= |C|_F / sqrt(n)` and `|B|_F |C|_F >= |A|_*`, which is tr A: A is semi-definite.
        """
        return float(np.vdot(self.decoder.T, self.strategy)) / len(self.decoder)

    def causal(self) -> OfflineFactorization:
        """Return the lower-triangular strategy L of the same C^T C, and of the same errors.

        C = Q L with Q orthogonal, and B becomes B Q. L is the reverse Cholesky factor of C^T C,
        found without forming that product, so that C may be singular.
        """
        q, r = np.linalg.qr(self.strategy[:, ::-1])
        signs = np.where(np.diag(r) < 0, -1.0, 1.0)  # for a diagonal >= 0, as Cholesky has it
        q, lower = (q * signs)[:, ::-1], (r.T * signs).T[::-1, ::-1]
        return OfflineFactorization(lower, self.decoder @ q)


def offline_factorization(workload: ArrayLike, bands: int | None = None) -> OfflineFactorization:
    """Split a symmetric positive semi-definite A as B = C = A^(1/2), or keep p bands of the root.

    The whole root is optimal if diag(A) is constant, and for a definite A only then (with columns
    scaled by A_ii^-t, a small t lowers the error of any other). A singular A is no obstacle to it.

    Args:
        workload: A, shape (n, n); O(n^2) memory and O(n^3) time.
        bands: C = the entries of A^(1/2) with |i - j| < bands, B = A C^-1. None is the whole root.

    Raises:
        RootnoiseError: an A that is not square, not finite, not symmetric or not semi-definite
            (both up to rounding), or zero; bands outside [1, n], or that leave no B with B C = A.

    >>> made = offline_factorization([[2.0, 1.0], [1.0, 2.0]])
    >>> round(made.rmse, 12), round(made.lower_bound, 12)
    (2.0, 2.0)
    """
    a = matrix("workload", workload)
    n = len(a)
    p = n if bands is None else integer("bands", bands, 1, n, high_name="n")
    root = _root(a)
    if p == n:
        return OfflineFactorization(root, root)
    strategy = np.triu(np.tril(root, p - 1), 1 - p)
    decoder = lstsq(strategy.T, a.T, cond=n * np.finfo(float).eps)[0].T
    if np.linalg.norm(decoder @ strategy - a) > RESIDUAL * np.linalg.norm(a):
        raise RootnoiseError(
            f"bands must leave an invertible strategy, got a singular C for bands={p}"
        )
    return OfflineFactorization(strategy, decoder)


def _root(a: Array) -> Array:
    """Return the symmetric positive semi-definite root, or refuse."""
    rounding = len(a) * np.finfo(float).eps
    if not a.any():
        raise RootnoiseError("workload must be non-zero, got zeros only")
    gap = np.abs(a - a.T)
    if gap.max() > rounding * np.abs(a).max():
        if not np.triu(a, 1).any():
            raise RootnoiseError(
                "workload must be symmetric to be factorized offline, "
                "got a lower-triangular one: use MatrixWorkload"
            )
        i, j = np.unravel_index(gap.argmax(), gap.shape)
        found = f"{a[i, j]:g} at ({i}, {j}) and {a[j, i]:g} at ({j}, {i})"
        raise RootnoiseError(f"{_RULE}, got {found}")
    values, vectors = eigh(a)
    if values[0] < -rounding * np.abs(values).max():
        raise RootnoiseError(f"{_RULE}, got the eigenvalue {values[0]:g}")
    values[values < rounding * values[-1]] = 0  # or the root of a singular A is off by 1e-8
    return np.asarray((vectors * np.sqrt(values)) @ vectors.T)


_RULE = "workload must be lower-triangular or symmetric positive semi-definite"


class Ablation(NamedTuple):
    """One row of `ablation`: refused for a reason, or with an error.

    Attributes:
        label: what was changed.
        refused: the reason; None where A was factorized.
        rmse: the error at noise multiplier 1; None where refused.
        relative: rmse divided by that of the whole root of the workload as given.
    """

    label: str
    refused: str | None
    rmse: float | None
    relative: float | None


def ablation(workload: ArrayLike, bands: Sequence[int] = (1, 2, 4)) -> list[Ablation]:
    """Measure what breaking the band, the symmetry and the definiteness of A does.

    Args:
        workload: a symmetric positive semi-definite A, shape (n, n).
        bands: truncations of the root to measure.

    Raises:
        RootnoiseError: the workload as given is refused by `offline_factorization`.

    >>> ablation([[2.0, 1.0], [1.0, 2.0]])[-1].refused
    'workload must be lower-triangular or ... semi-definite, got the eigenvalue -0.3'
    """
    whole = offline_factorization(workload)
    a = matrix("workload", workload)
    half = np.tril(a, -1) - np.triu(a, 1)
    unit, values = np.eye(len(a)), np.linalg.eigvalsh(a)
    singular = a - values[0] * unit

    def row(label: str, build: Callable[[], OfflineFactorization]) -> Ablation:
        try:
            rmse = build().rmse
        except RootnoiseError as reason:
            return Ablation(label, str(reason), None, None)
        return Ablation(label, None, rmse, rmse / whole.rmse)

    def of(label: str, changed: Array, p: int | None = None) -> Ablation:
        return row(label, lambda: offline_factorization(changed, p))

    return [
        of("whole root", a),
        row("causal", whole.causal),
        *(of(f"{p} bands", a, p) for p in bands),
        of("half the upper triangle", a + half / 2),
        of("no upper triangle", a + half),
        of("least eigenvalue 0", singular),
        *(of(f"least eigenvalue 0, {p} bands", singular, p) for p in bands),
        of("least eigenvalue below 0", singular - 0.1 * values[-1] * unit),
    ]
