"""Causal maps from their JSON descriptions."""

from __future__ import annotations

from typing import Any

from rootnoise._check import RootnoiseError, matrix, vector
from rootnoise.causal.base import _READERS, CausalMatrix, Inverse
from rootnoise.causal.elementary import Dense, Diagonal, Toeplitz
from rootnoise.causal.product import Product


def from_dict(fields: dict[str, Any]) -> CausalMatrix:
    """Rebuild a map from `to_dict`; every check of the constructors runs again.

    Raises:
        RootnoiseError: an unknown type, or fields that are missing or do not belong.
    """
    match fields:
        case {"type": "toeplitz", "n_steps": int(n), "leading": list(leading), **rest} if not rest:
            return Toeplitz(vector("leading", leading), n)
        case {"type": "diagonal", "entries": list(entries), **rest} if not rest:
            return Diagonal(vector("entries", entries))
        case {"type": "dense", "entries": list(entries), **rest} if not rest:
            return Dense(matrix("entries", entries))
        case {"type": "inverse", "base": dict(base), **rest} if not rest:
            return Inverse(from_dict(base))
        case {"type": "product", "left": dict(left), "right": dict(right), **rest} if not rest:
            return Product(from_dict(left), from_dict(right))
        case {"type": str(kind), **rest} if kind in _READERS:
            try:
                return _READERS[kind](**rest)
            except TypeError:  # fields that are missing or do not belong: refused below
                pass
    raise RootnoiseError(f"matrix must be a known causal map, got {fields!s:.60}")
