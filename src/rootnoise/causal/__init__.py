"""Which causal (lower-triangular) maps are there, and how do they act, invert and stream?"""

from rootnoise.causal.base import CausalMatrix, Inverse, readable
from rootnoise.causal.elementary import Dense, Diagonal, Toeplitz
from rootnoise.causal.product import Product, chain
from rootnoise.causal.reading import from_dict

__all__ = [
    "CausalMatrix",
    "Dense",
    "Diagonal",
    "Inverse",
    "Product",
    "Toeplitz",
    "chain",
    "from_dict",
    "readable",
]
