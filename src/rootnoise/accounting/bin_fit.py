"""Which chain bounds a Gram matrix, for an epsilon: every entry of one is at least the other's.

* from above: b - g neighbours, g the largest distance in the circle of means that are not
  orthogonal. Either a plain chain, linked decay^d at least every product at distance d <= g, or
  blocks of q = g means of independent Z: two means at most g apart are then in one block or in
  adjacent ones, and take from a common Z.
* from below: blocks of independent Z, where no two means that take from a common Z have a larger
  product than any at their distance. Some bins may count as of length 0.

Any choice is valid. What is chosen is what a mean that stands out sees of its neighbours most, or
least. docs/accounting.md has the proofs.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import NonlinearConstraint, minimize

from rootnoise._check import Array
from rootnoise.accounting.bin_chain import Chain

# Decays of plain chains that are tried.
DECAYS = tuple(np.linspace(0.02, 0.98, 97).tolist())
# Logarithms that chains do not go beyond: their exponentials are known to `RELATIVE` up to here.
HIGHEST = 150.0
# Blocks of up to so many means are tried in upper bounds: beyond, they never were the better ones.
LONGEST = 6
# And of up to so many in lower bounds: time grows with their square. Shorter ones have larger
# products, and lack more of the pairs.
LONGEST_BELOW, SHORTER = 32, (2, 4, 8)
# How loads start: (1 - distance from the middle)^power; and rounds of their growth.
POWERS, ROUNDS = (0.3, 0.5, 0.7, 1.0, 1.5), 40
# What is left of a squared length is at least this part of it, or none.
REST = 1e-3


def chains_above(gram: Array, epsilon: float) -> list[Chain]:
    """Return chains that hide at most as well, of either kind, for an epsilon like this one."""
    b, largest = len(gram), diagonals(gram).max(axis=1)
    ring = np.maximum(0.0, largest[: b // 2 + 1])
    far = int(np.flatnonzero(ring)[-1])
    left = b - far
    if far == 0 or left < 2:
        return []
    own, products = float(ring[0]), ring[1 : far + 1]
    # A mean that stands out alone has log l = level; the others are seen through it.
    level = _level(b, epsilon, own)
    if level is None:
        return []
    best, distances = None, np.flatnonzero(products) + 1
    logs = np.log(products[distances - 1]) - math.log(own)
    for decay in DECAYS:
        # In logarithms: decay^d may be below the least number there is.
        needed = logs - distances * math.log(decay)
        if needed.max() > 1e-9:
            continue
        linked = own * math.exp(float(needed.max()) + 1e-12)  # known to a part of 3e-13
        cost = _seen(min(linked, own) * decay ** np.arange(1, left), own, level)
        if best is None or cost < best[0]:
            best = cost, linked, decay
    found = []
    if best is not None:
        _, linked, decay = best
        alone = own - linked if own - linked > 1e-9 * own else 0.0
        # What is too little to be alone is linked: no mean is shorter than one of these.
        found.append(Chain.plain(left, linked if alone > 0 else max(linked, own), decay, alone))
    loads = _loads_above(products, own, level) if far <= min(LONGEST, left) else None
    if loads is not None:
        # Or is alone for all that.
        found.append(_blocks(left, loads, own, 0, least=REST * own))
    return found


def chains_below(gram: Array, epsilon: float) -> list[Chain]:
    """Return chains that hide at least as well, for an epsilon like this one.

    They are the one of the longest blocks that are tried, and the best one by what is seen.
    """
    b, long, best = len(gram), None, None
    longest = float(np.diag(gram).max())
    if b < 2 or gram.min() < 0:
        return []
    level = _level(b, epsilon, longest)
    if level is None:
        return []
    # The last steps of a run cut means short: those bins may count as none.
    short = np.flatnonzero(np.diag(gram) < (1 - 1e-3) * longest)
    for moving in {b, int(short[0]) if len(short) else b}:
        least = np.array([np.diag(gram[:moving, :moving], d).min() for d in range(moving)])
        own = float(least[0]) if moving else 0.0
        far = int(np.argmax(least <= 0)) if np.any(least <= 0) else moving
        alone = math.exp(level * math.sqrt(own / longest) - own / 2)
        if far < 2:
            continue
        last = min((far + 1) // 2, LONGEST_BELOW)
        for q in sorted({min(far // 2, last), last} | {q for q in SHORTER if q < far // 2}):
            gain, loads = _loads_below(np.append(least, np.zeros(2 * q))[: 2 * q], own, level)
            found = moving / b * (alone + gain), _blocks(b, loads, own, b - moving, least=0.0)
            if q >= min(far // 2, last) and (long is None or found[0] > long[0]):
                long = found
            if best is None or found[0] > best[0]:
                best = found
    if long is None or best is None:
        return []
    return [long[1]] if long[1] == best[1] else [long[1], best[1]]


def _level(b: int, epsilon: float, own: float) -> float | None:
    """Return the x of an e^{x - own / 2} that makes up what is above 1 of L = e^epsilon."""
    if not math.log(b) + epsilon + own / 2 <= HIGHEST:
        return None
    return math.log(b * math.expm1(max(epsilon, 1e-2))) + own / 2


def _seen(products: Array, own: float, level: float) -> float:
    """Return what neighbours of a mean of this log l have on average, less 1."""
    return float(np.expm1(products / own * level - np.square(products) / (2 * own)).sum())


def shared(loads: Array) -> tuple[Array, Array]:
    """Return the products of means of one block, and of those of one with those of the next.

    Args:
        loads: what the q means of a block take of the next Z, then what they take of their own.
    """
    tails, heads = loads[: len(loads) // 2], loads[len(loads) // 2 :]
    return np.outer(heads, heads) + np.outer(tails, tails), np.outer(tails, heads)


def _wanted(products: Array, q: int) -> tuple[Array, Array]:
    """Return, at the places of `shared`, the products of means so far apart; own ones first."""
    u = np.arange(q)
    return products[np.abs(u - u[:, None])], products[q + u - u[:, None]]


def _around(loads: Array, own: float, level: float) -> float:
    """Return what the neighbours of a mean have on average, for the mean of a block."""
    one, next_ = shared(loads)
    q = len(one)
    inside = _seen(one, own, level) - _seen(np.diag(one), own, level)
    return (inside + 2 * _seen(next_, own, level)) / q


def _loads_below(least: Array, own: float, level: float) -> tuple[float, Array]:
    """Return loads whose products are at most `least`, by distance, and what is seen of them."""
    q = len(least) // 2
    one, next_ = _wanted(least, q)

    def fits(loads: Array) -> bool:
        inside, across = shared(loads)
        return bool(np.all(inside <= one) and np.all(across <= next_))

    # Both sides grow at once, so that means mirror each other; the last may have to be 0.
    places = [[q - 1 - k, q + k] for k in range(q)]
    if least[-1] <= 0:
        places = [[k] for k in range(1, 2 * q)]
    best = -math.inf, np.zeros(2 * q)
    for power in POWERS:
        loads = (1 - np.abs(np.arange(2 * q) - q + 0.5) / q) ** power
        loads[: 1 if least[-1] <= 0 else 0] = 0.0
        ratios = [a[b > 0] / b[b > 0] for a, b in zip((one, next_), shared(loads), strict=True)]
        loads *= math.sqrt(min(ratio.min(initial=math.inf) for ratio in ratios)) * (1 - 1e-9)
        step = 0.3
        for _ in range(ROUNDS):
            grown = False
            for k in places:
                more = loads.copy()
                more[k] += step * loads[q]
                if fits(more):
                    loads, grown = more, True
            if not grown:
                step /= 2
        gain = _around(loads, own, level)
        if gain > best[0]:
            best = gain, loads
    return best


def _loads_above(products: Array, own: float, level: float) -> Array | None:
    """Return loads of blocks of as many means as there are products, at least those by distance."""
    q = len(products)
    one, next_ = _wanted(np.concatenate([[0.0], products, np.zeros(q)]), q)

    def whole(half: Array) -> Array:
        return np.concatenate([half[::-1], half])

    def spare(half: Array) -> Array:
        inside, across = shared(whole(half))
        return np.concatenate(
            [
                (inside - one)[np.triu_indices(q, 1)],
                (across - next_)[next_ > 0],
                own - np.diag(inside),
            ]
        )

    def cost(half: Array) -> float:
        return _around(whole(half), own, level)

    best, limits = None, NonlinearConstraint(spare, 0.0, np.inf)
    for power in POWERS:
        half = math.sqrt(own) * 0.9 * (1 - (np.arange(q) + 0.5) / q / 1.1) ** power
        found = minimize(
            cost, half, method="SLSQP", bounds=[(1e-6, None)] * q, constraints=(limits,)
        )
        loads = whole(np.maximum(np.abs(found.x), 1e-6))
        inside, across = shared(loads)
        least = max((one / inside).max(), (next_ / across).max())
        loads *= math.sqrt(max(1.0, float(least))) * (1 + 1e-12)
        if not np.all(np.isfinite(loads)) or np.diag(shared(loads)[0]).max() > 1.001 * own:
            continue
        seen = _around(loads, own, level)
        if best is None or seen < best[0]:
            best = seen, loads
    return None if best is None else best[1]


def _blocks(bins: int, loads: Array, own: float, still: int, *, least: float) -> Chain:
    """Return the chain of these loads, whose means are as long as `own`, alone at least `least`."""
    q = len(loads) // 2
    left = own - np.diag(shared(loads)[0])
    alone = np.maximum(np.where(left > REST * own, left, 0.0), least)
    tails, heads = loads[:q].tolist(), loads[q:].tolist()
    return Chain(bins, tuple(heads), tuple(tails), tuple(alone.tolist()), 0.0, still)


def diagonals(gram: Array) -> Array:
    """Return gram[i, (i + d) % b] at place [d, i]."""
    i = np.arange(len(gram))
    products: Array = gram[i, (i + i[:, None]) % len(gram)]
    return products
