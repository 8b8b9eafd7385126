"""Which causal (lower-triangular) maps are there, and how do they act, invert and stream?"""

from rootnoise.causal.base import MAPS, CausalMatrix, Inverse
from rootnoise.causal.elementary import Dense, Diagonal, Toeplitz
from rootnoise.causal.product import Product, chain

__all__ = [
    "CausalMatrix",
    "Dense",
    "Diagonal",
    "Inverse",
    "Product",
    "Toeplitz",
    "chain",
    "from_dict",
]

from_dict = MAPS.from_dict
