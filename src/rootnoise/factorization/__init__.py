"""HOW to split a workload A = B C: one function an algorithm, one registry."""

from rootnoise.factorization import (
    banded,
    banded_inverse,
    bandmf,
    baseline,
    blt,
    dense,
    scaled,
    square_root,
    tree,
)
from rootnoise.factorization.base import (
    AIMLESS,
    Factorization,
    default_bands,
    factorize,
    mechanisms,
)

__all__ = [
    "AIMLESS",
    "Factorization",
    "banded",
    "banded_inverse",
    "bandmf",
    "baseline",
    "blt",
    "default_bands",
    "dense",
    "factorize",
    "mechanisms",
    "scaled",
    "square_root",
    "tree",
]
