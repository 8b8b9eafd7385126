"""Certain bounds on epsilon for balls in bins of any Gram matrix, by comparison.

For convex f, E_Q f(L) grows with every entry of the Gram matrix (Kahane 1985; `dominating` has the
formula), and by Jensen's inequality it falls when L is replaced by a mean of variables like it.
Both directions of the hockey-stick divergence are such f. So bins are compared with means that can
be computed, and the better comparison counts. With equal products, v on the diagonal, c elsewhere:

* from above: the b means, in a circle, are the average over its b rotations of b // m of them, m
  apart. They hide at least as well as b // m means with v the largest entry of the diagonal, and c
  the largest entry of any two means at least m apart in the circle. m is free.
* from below: the means cut into ceil(b / m) runs of at most m neighbours hide at most as well as as
  many equally likely means with v the least entry of any two that are less than m apart, and c the
  least entry off the diagonal. (Unequal weights would only hide less.) m is free.

With a Markov chain (`bin_chain`), where neighbours are correlated and distant means are not: from
above with the average over rotations of b - g neighbours, which are a row, no more a circle; from
below with blocks of neighbours. `bin_fit` chooses the chains.

Bins whose means are orthogonal and equally long, as those of independent noise, are compared with
themselves: the bounds are tight. docs/accounting.md has the proofs.
"""

from __future__ import annotations

import math

import numpy as np

from rootnoise._check import Array
from rootnoise.accounting.bin_chain import COARSE as COARSER
from rootnoise.accounting.bin_chain import Chain
from rootnoise.accounting.bin_fit import chains_above, chains_below, diagonals
from rootnoise.accounting.gaussian import gaussian_epsilon
from rootnoise.accounting.random_allocation import SIZES, Allocation, Interval

# Distances m that are tried, and the grids that choose among them.
DISTANCES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
COARSE = SIZES[:2]
# Rounding costs chains some 1e-12 e^epsilon of delta: beyond delta e^27 they state nothing.
REACH = 27.0
# Grids for a first look at a noise multiplier, which steers searches.
QUICK = SIZES[:3]
# A lower bound that a coarse look shows to be less than this part of the upper one stays so: of
# many bands in one epoch, where neither is near, to refine it takes 5 s.
NEARER = 0.4
# Lower bounds by blocks of more means than this are made on a lattice so much coarser: 1 % less in
# a quarter of the time.
FEW, LESS = 4, 1.5
# The part of the bins that a chain must keep, or means far apart are tried as well.
LEFT = 0.75


def bounds(
    gram: Array, delta: float, attained: Array | None = None, sizes: tuple[int, ...] = SIZES
) -> Interval:
    """Return bounds on the epsilon of b equally likely means against none.

    Args:
        gram: their products, >= 0, in units of the noise.
        delta: in (0, 1).
        attained: products of means that somebody's data can have, entry by entry at most `gram`;
            the lower bound is theirs. `gram` itself where left out.
        sizes: as in `above`.
    """
    upper = above(gram, delta, sizes)
    return Interval(below(gram if attained is None else attained, delta, upper), upper)


def above(gram: Array, delta: float, sizes: tuple[int, ...] = SIZES) -> float:
    """Return an upper bound.

    Args:
        gram: as in `bounds`.
        delta: in (0, 1).
        sizes: points of the grids; fewer are faster, and the bound wider.
    """
    spaced = _spaced(gram)
    if spaced == _merged(gram):  # nothing is lost
        return _best(spaced, delta, sizes, above=True).upper
    quick = len(sizes) < len(SIZES)
    upper, chain = _linked(gram, delta, _any(gram, delta))
    if chain is None or chain.bins < LEFT * len(gram) or not quick:
        upper = min(upper, _best(spaced, delta, sizes, above=True).upper)
    upper, again = _linked(gram, delta, upper)
    chain = again or chain
    if quick or chain is None:
        return upper
    return min(upper, chain.upper(delta, upper))


def below(gram: Array, delta: float, upper: float) -> float:
    """Return a lower bound on what `upper` bounds; `gram` as `attained` in `bounds`."""
    lower, merged = _alone(gram, delta), _merged(gram)
    if merged == _spaced(gram):
        return max(lower, _best(merged, delta, SIZES, above=False).lower)
    lower = max(lower, _best(merged, delta, COARSE, above=False).lower)
    stop = min(upper, math.log(delta) + REACH)
    for chain in chains_below(gram, stop) if stop > 0 else []:
        found = chain.lower(delta, stop, COARSER)
        if found >= NEARER * stop:
            found = chain.lower(delta, stop, 1.0 if len(chain.heads) <= FEW else LESS)
        lower = max(lower, found)
    return lower


def tight(gram: Array) -> bool:
    """Whether `above` compares bins with themselves: orthogonal means, equally long."""
    return _spaced(gram) == _merged(gram)


def _linked(gram: Array, delta: float, upper: float) -> tuple[float, Chain | None]:
    """Return the least bound of chains in a first look, at most `upper`, and which has it."""
    best, start = None, min(upper, math.log(delta) + REACH)
    for chain in chains_above(gram, start) if start > 0 else []:
        found = chain.upper(delta, start, COARSER)
        if found < upper or (best is None and math.isfinite(found)):
            upper, best = min(found, upper), chain
    return upper, best


def _best(
    candidates: list[Allocation], delta: float, sizes: tuple[int, ...], *, above: bool
) -> Interval:
    """Return the bounds of the candidate that is best from one side."""
    if not candidates:
        return Interval(0.0, math.inf)
    if len(candidates) == 1:
        return candidates[0].epsilon(delta, sizes)
    coarse = [candidate.epsilon(delta, COARSE) for candidate in candidates]
    ranks = [found.upper if above else -found.lower for found in coarse]
    return candidates[int(np.argmin(ranks))].epsilon(delta, sizes)


def _spaced(gram: Array) -> list[Allocation]:
    """Return what hides at most as well, from above."""
    b, largest = len(gram), diagonals(gram).max(axis=1)
    found: dict[float, Allocation] = {}
    for m in DISTANCES:
        if m > 1 and b // m < 2:
            break
        shared = float(largest[m : b - m + 1].max(initial=0.0))
        own = float(largest[0]) - shared
        if own > 0:  # more distance without smaller products only leaves fewer bins
            found.setdefault(shared, Allocation(b // m, own, shared))
    return list(found.values())


def _merged(gram: Array) -> list[Allocation]:
    """Return what hides at least as well, from below."""
    b, least = len(gram), diagonals(gram).min(axis=1)
    shared = float(least[1:].min(initial=math.inf)) if b > 1 else 0.0
    found = []
    for m in DISTANCES:
        # Neighbours less than m apart in a row are so in the circle.
        nearest = np.concatenate([least[:m], least[b - m + 1 :]])
        own = float(nearest.min()) - shared
        if m > b or shared < 0 or own <= 0:
            break
        found.append(Allocation(-(-b // m), own, shared))
    return found


def _any(gram: Array, delta: float) -> float:
    """Return the epsilon of the longest mean, were it known."""
    return gaussian_epsilon(1 / math.sqrt(float(np.diag(gram).max())), delta)


def _alone(gram: Array, delta: float) -> float:
    """Return what the longest mean gives alone: as L >= x / b, delta >= delta_x(b e^eps) / b."""
    b, longest = len(gram), float(np.diag(gram).max())
    if b * delta >= 1 or longest <= 0:
        return 0.0
    # Known to 1e-11 of delta, from above.
    alone = gaussian_epsilon(1 / math.sqrt(longest), min(b * delta * (1 + 1e-9), 1 - 1e-9))
    return max(0.0, alone * (1 - 1e-9) - math.log(b) - 1e-9)
