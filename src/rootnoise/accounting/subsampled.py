"""The privacy loss of one Poisson-subsampled Gaussian on a grid, never below the true one.

With t = (2x - 1) / (2 sigma^2) and L = log(1 - q + q e^t), a record's removal has the loss L at x
of density (1 - q) N(0, sigma^2) + q N(1, sigma^2), and its addition -L at x of N(0, sigma^2).

A loss s between the grid's a and b = a + h is shared out so that e^-s is kept in the mean ("connect
the dots", Doroshenko et al. 2022): (1 - e^(a - s)) / (1 - e^-h) of its mass to b, the rest to a. As
(1 - e^(eps - s - s'))_+ is convex in e^-s for every s', that never lowers a composed delta.

The axis is cut where the loss is on the grid and at least every `PIECE` sigma, and each piece has
a Gauss-Legendre rule. Nothing is subtracted from what it is close to, and what remains of error is
paid for (docs/accounting.md derives it):

* losses are known to `slack`: shares are of a loss higher by 2 slack, and every step of a
  composition adds `excess` to epsilon, which pays for the ends of pieces;
* masses are too small by a part of at most `short`, by which every one is raised.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import log_ndtr

from rootnoise._check import Array
from rootnoise.accounting.composition import UNIT, Losses

NODES, WEIGHTS = np.polynomial.legendre.leggauss(6)
# Longest piece, in sigma: the rule's remainder stays below 1e-15 of the mass.
PIECE = 0.05
ROOT = math.sqrt(2 * math.pi)


def losses(sigma: float, q: float, width: float, log_cut: float, *, add: bool) -> Losses:
    """Return the losses of the one direction, `width` apart.

    Args:
        sigma: noise multiplier.
        q: sampling probability, in (0, 1].
        width: h of the grid.
        log_cut: tails of at most e^log_cut are cut: lower losses are raised, higher ones infinite.
        add: the record is added, else removed.
    """
    z = math.sqrt(-2 * log_cut)  # Phi(-z) <= e^(-z^2 / 2)
    low, high = -z * sigma, z * sigma + (0.0 if add else 1.0)
    sign = -1 if add else 1
    ends = sorted(sign * _loss(np.array([low, high]), sigma, q))
    first, last = math.floor(ends[0] / width), math.ceil(ends[1] / width)
    x = _pieces(sigma, q, sign * width * np.arange(first, last + 1.0), low, high)

    half = np.diff(x)[:, None] / 2
    nodes = (x[:-1, None] + half) + half * NODES
    loss = sign * _loss(nodes, sigma, q)
    cell = np.floor(sign * _loss(x[:-1] + half[:, 0], sigma, q) / width)
    cell = np.clip(cell, first, last - 1)
    slack = _slack(sigma, q, low, high, ends)
    above = loss - width * cell[:, None]
    off = max(0.0, -float(above.min()), float(above.max()) - width)
    above = np.clip(above + 2 * slack, 0.0, width)

    density = np.exp(-np.square(nodes / sigma) / 2)
    if not add:
        density = (1 - q) * density + q * np.exp(-np.square((nodes - 1) / sigma) / 2)
    density *= half * WEIGHTS / (sigma * ROOT)
    upper = (density * (np.expm1(-above) / math.expm1(-width))).sum(axis=1)
    lower = (density * (np.expm1(width - above) / math.expm1(width))).sum(axis=1)
    place = (cell - first).astype(np.int64)
    masses: Array = np.zeros(last - first + 1)
    np.add.at(masses, place, lower)
    np.add.at(masses, place + 1, upper)

    # Both tails, each at most Phi(-z): up to the first cell's upper end, and to infinity.
    tail = math.exp(float(log_ndtr(-z)) + 1e-9)
    masses[1] += tail
    reach = max(abs(low), abs(high)) / sigma
    short = UNIT * (4 * reach**2 + 64 + float(np.bincount(place).max()))
    return Losses(width, first, masses * (1 + short), tail, 4 * slack + off)


def _loss(x: Array, sigma: float, q: float) -> Array:
    """Return L, to `_slack`."""
    t = (x - 0.5) / sigma**2
    excess = q * np.expm1(np.minimum(t, 30.0))
    far = (excess < -0.5) | (t > 30)
    found: Array = np.log1p(np.where(far, 0.0, excess))
    if far.any():
        none = math.log1p(-q) if q < 1 else -math.inf
        found[far] = np.logaddexp(none, math.log(q) + t[far])
    return found


def _slack(sigma: float, q: float, low: float, high: float, ends: list[float]) -> float:
    """Return what `_loss` and a grid's point are off by at most: dL/dt <= 1."""
    most = max(abs(low - 0.5), abs(high - 0.5)) / sigma**2
    logs = (-math.log(q) if most > 30 else 0.0) + (-math.log1p(-q) if 0.5 < q < 1 else 0.0)
    return 16 * UNIT * (most + max(map(abs, ends)) + logs + 1)


def _pieces(sigma: float, q: float, levels: Array, low: float, high: float) -> Array:
    """Return where L crosses `levels` and steps of at most `PIECE` sigma, in order."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        near = np.log1p(np.expm1(np.minimum(levels, 1.0)) / q)
        t = np.where(levels < 1, near, levels + np.log1p((q - 1) * np.exp(-levels)) - math.log(q))
    x = sigma**2 * t + 0.5
    even = np.linspace(low, high, math.ceil((high - low) / (PIECE * sigma)) + 1)
    pieces: Array = np.unique(np.concatenate([even, x[(x > low) & (x < high)]]))
    return pieces
