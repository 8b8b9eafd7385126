"""Clipping in one backward pass, from each layer's inputs and output gradients.

This is the book-keeping of Bu et al. (2023), "Differentially private optimization on large model at
small cost": `taps` keeps the inputs and output gradients of each layer, `layers` computes norms and
clipped sums from them, `bounds` proves that no norm is too small, `rules` turns norms into factors,
and `PrivateModule` is what a training loop holds. No raw gradient is ever written.
"""

from rootnoise.training.clip.module import PrivateModule
from rootnoise.training.clip.rules import Automatic, ClipRule, Flat, PerLayer

__all__ = ["Automatic", "ClipRule", "Flat", "PerLayer", "PrivateModule"]
