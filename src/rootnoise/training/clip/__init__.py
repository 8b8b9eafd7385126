"""Clipping in one backward pass: each layer's input and output gradient, never a raw gradient.

Book-keeping after Bu et al. (2023), "Differentially private optimization on large model at small
cost": `taps` keeps what backward passes through a layer, `layers` makes norms and clipped sums of
it, `bounds` proves that no norm is too small, `rules` turn norms into factors, and `PrivateModule`
is what a training loop holds.
"""

from rootnoise.training.clip.module import PrivateModule
from rootnoise.training.clip.rules import Automatic, ClipRule, Flat, PerLayer

__all__ = ["Automatic", "ClipRule", "Flat", "PerLayer", "PrivateModule"]
