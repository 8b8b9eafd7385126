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

With a Markov chain (`bin_chain`), where neighbours are correlated and distant means are not:

* from above: the average over rotations of b - g neighbours, g the largest distance in the circle
  of means that are not orthogonal; those left are a row, no more a circle.
* from below: runs of m neighbours, orthogonal to each other; some bins may count as of length 0.

Bins whose means are orthogonal and equally long, as those of independent noise, are compared with
themselves: the bounds are tight. docs/accounting.md has the proofs.
"""

from __future__ import annotations

import math

import numpy as np

from rootnoise._check import Array
from rootnoise.accounting.bin_chain import COARSE as COARSER
from rootnoise.accounting.bin_chain import Chain
from rootnoise.accounting.gaussian import gaussian_epsilon
from rootnoise.accounting.random_allocation import SIZES, Allocation, Interval

# Distances m that are tried, and the grids that choose among them.
DISTANCES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
COARSE = SIZES[:2]
# Grids for a first look at a noise multiplier.
QUICK = SIZES[:3]
# Decays of chains that are tried, and lengths of runs in lower bounds.
DECAYS = tuple(np.linspace(0.02, 0.98, 97).tolist())
# The part of the bins that a chain must keep, or means far apart are tried as well.
LEFT = 0.75
RUNS = (2, 3, 4, 6, 8, 12, 16, 24, 32)
# Logarithms that chains do not go beyond: their exponentials are known to `RELATIVE` up to here.
HIGHEST = 150.0


def bounds(
    gram: Array, delta: float, attained: Array | None = None, sizes: tuple[int, ...] = SIZES
) -> Interval:
    """Return bounds on the epsilon of b equally likely means against none.

    Args:
        gram: their products, >= 0, in units of the noise.
        delta: in (0, 1).
        attained: products of means that somebody's data can have, entry by entry at most `gram`;
            the lower bound is theirs. `gram` itself where left out.
        sizes: points of the grids; fewer are faster, and their bounds wider.
    """
    least = gram if attained is None else attained
    above, below, lower = _spaced(gram), _merged(least), _alone(least, delta)
    if above == below:  # nothing is lost on either side
        found = _best(above, delta, sizes, above=True)
        return Interval(max(lower, found.lower), found.upper)
    coarse = COARSER if len(sizes) < len(SIZES) else 1.0
    upper = _any(gram, delta)
    chain = linked_above(gram, upper)
    linked = math.inf if chain is None else chain.upper(delta, upper, COARSER)
    upper = min(upper, linked)
    if chain is None or math.isinf(linked) or chain.bins < LEFT * len(gram):
        upper = min(upper, _best(above, delta, sizes, above=True).upper)
    chain = linked_above(gram, upper)
    if chain is not None and coarse < COARSER:
        upper = min(upper, chain.upper(delta, upper, coarse))
    lower = max(lower, _best(below, delta, COARSE, above=False).lower)
    chain = linked_below(least, upper)
    if chain is not None:
        lower = max(lower, chain.lower(delta, upper, coarse))
    return Interval(lower, upper)


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
    b, largest = len(gram), _diagonals(gram).max(axis=1)
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
    b, least = len(gram), _diagonals(gram).min(axis=1)
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


def linked_above(gram: Array, epsilon: float) -> Chain | None:
    """Return a chain that hides at most as well, chosen for an epsilon like this one."""
    b, largest = len(gram), _diagonals(gram).max(axis=1)
    ring = np.maximum(0.0, largest[: b // 2 + 1])
    far = int(np.flatnonzero(ring)[-1])
    left = b - far
    if far == 0 or left < 2:
        return None
    own, products = float(ring[0]), ring[1 : far + 1]
    # A mean that stands out alone has log l = level; the others are seen through it.
    level = math.log(b) + epsilon + own / 2
    if not level <= HIGHEST:
        return None
    best = None
    for decay in DECAYS:
        linked = float((products / decay ** np.arange(1, far + 1)).max())
        if linked > own * (1 + 1e-9):
            continue
        cost = _seen(min(linked, own) * decay ** np.arange(1, left), own, level)
        if best is None or cost < best[0]:
            best = cost, linked, float(decay)
    if best is None:
        return None
    _, linked, decay = best
    alone = _rest(own, linked)
    # What is too little to be alone is linked: no mean of the chain is shorter than one of these.
    return Chain(left, linked if alone > 0 else max(linked, own), decay, alone, left)


def linked_below(gram: Array, epsilon: float) -> Chain | None:
    """Return a chain that hides at least as well, chosen for an epsilon like this one."""
    b, best = len(gram), None
    longest = float(np.diag(gram).max())
    if b < 2 or gram.min() < 0:
        return None
    level = math.log(b) + epsilon + longest / 2
    if not level <= HIGHEST:
        return None
    # The last steps of a run cut means short: those bins may count as none.
    short = np.flatnonzero(np.diag(gram) < (1 - 1e-3) * longest)
    for moving in {b, int(short[0]) if len(short) else b}:
        if moving < 2:
            continue
        part = gram[:moving, :moving]
        own = float(np.diag(part).min())
        least = np.array([np.diag(part, d).min() for d in range(min(moving, RUNS[-1]))])
        for run in RUNS:
            if run > moving or least[1:run].min() <= 0:
                break
            d = np.arange(1, run)
            for decay in DECAYS:
                linked = min(float((least[1:run] / decay**d).min()), own)
                gain = _seen(linked * decay**d, own, level, 1 - d / run)
                gain = moving / b * (math.exp(level * math.sqrt(own / longest) - own / 2) + gain)
                if best is None or gain > best[0]:
                    best = gain, linked, float(decay), own, run, moving
    if best is None:
        return None
    _, linked, decay, own, run, moving = best
    return Chain(b, linked, decay, _rest(own, linked), run, b - moving)


def _seen(products: Array, own: float, level: float, weights: Array | float = 1.0) -> float:
    """Return what neighbours of a mean of this log l have on average, less 1, on both sides."""
    grown = np.expm1(products / own * level - np.square(products) / (2 * own))
    return float(2 * np.sum(weights * grown))


def _rest(own: float, linked: float) -> float:
    return own - linked if own - linked > 1e-9 * own else 0.0


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


def _diagonals(gram: Array) -> Array:
    """Return gram[i, (i + d) % b] at place [d, i]."""
    i = np.arange(len(gram))
    products: Array = gram[i, (i + i[:, None]) % len(gram)]
    return products
