"""HOW to split a workload A = B C: one function an algorithm, one registry."""

from rootnoise.factorization import baseline, square_root
from rootnoise.factorization.base import Factorization, default_bands, factorize, mechanisms

__all__ = [
    "Factorization",
    "baseline",
    "default_bands",
    "factorize",
    "mechanisms",
    "square_root",
]
