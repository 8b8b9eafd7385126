"""Square-root factorizations: the full root and its banded truncation, BSR."""

from __future__ import annotations

from rootnoise.causal import Toeplitz
from rootnoise.factorization.base import Factorization, checked_bands, register
from rootnoise.participation import Participation
from rootnoise.workload import Workload


@register("square-root")
def square_root(workload: Workload, participation: Participation) -> Factorization:
    """C = B = A^(1/2) (Fichtenberger, Henzinger & Upadhyay 2023; Henzinger & Upadhyay 2025)."""
    n = workload.n_steps
    root = Toeplitz(workload.square_root(n), n)
    return Factorization("square-root", workload, root, known_decoder=root)


@register("bsr")
def bsr(
    workload: Workload, participation: Participation, bands: int | None = None
) -> Factorization:
    """C = the first p bands of A^(1/2), B = A C^-1 (Kalinin & Lampert 2024)."""
    n = workload.n_steps
    p = checked_bands(bands, n, participation)
    root = Toeplitz(workload.square_root(p), n)
    return Factorization("bsr", workload, root, known_decoder=root if p == n else None)
