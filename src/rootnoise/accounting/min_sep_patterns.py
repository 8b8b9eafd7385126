"""Patterns of b-min-sep Poisson sampling under a tilt, one or two at a time, and their weight.

A pattern's weight is its probability times exp((theta^2 - theta) |m_pi|^2 / 2); that of a pair is
the product of both, times exp(theta^2 <m_pi, m_pi'>). As columns b apart do not overlap, the
weights are a Markov chain in the waits: the steps until each pattern may go on. One backward pass
gives their sum, kappa, and the probabilities with which patterns drawn forwards join each step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rootnoise._check import Array


@dataclass(frozen=True, eq=False)
class Chain:
    """Tilted patterns, to be drawn.

    Attributes:
        log_scale: log kappa; not finite where it overflows.
        start: probability of the waits at step 0, shape (b,) or (b, b).
        first: probability that the first pattern joins if it may, by step and the other's wait.
        second: the same of the second pattern, by step and what the first one does: its wait, or 0
            where it may join and does not, or b where it joins. None for one pattern.
    """

    log_scale: float
    start: Array
    first: Array
    second: Array | None

    def draw(self, rng: np.random.Generator, size: int) -> Array:
        """Return how many patterns join each step, (n, size)."""
        n, b = self.first.shape[0], self.start.shape[0]
        waits = rng.choice(self.start.size, size, p=self.start.ravel())
        joined = np.zeros((n, size))
        if self.second is None:
            wait = waits
            for t in range(n):
                joins = (wait == 0) & (rng.random(size) < self.first[t, 0])
                joined[t] = joins
                wait = np.where(joins, b - 1, np.maximum(wait - 1, 0))
            return joined
        one, two = np.divmod(waits, b)
        for t in range(n):
            enters = (one == 0) & (rng.random(size) < self.first[t].take(two))
            state = np.where(enters, b, one)
            follows = (two == 0) & (rng.random(size) < self.second[t].take(state))
            np.add(enters, follows, out=joined[t], dtype=np.float64)
            one = np.where(enters, b - 1, np.maximum(one - 1, 0))
            two = np.where(follows, b - 1, np.maximum(two - 1, 0))
        return joined


def start(min_sep: int, probability: float) -> Array:
    """Return the stationary probability of every wait 0, ..., b - 1."""
    rate = probability / (1 + (min_sep - 1) * probability)
    return np.concatenate([[rate / probability], np.full(min_sep - 1, rate)])


def single(squares: Array, min_sep: int, probability: float, power: float) -> Chain:
    """Return one pattern at a time; `squares` are those of the columns' norms."""
    n, b, p = squares.size, min_sep, probability
    value, first = np.ones(b), np.empty((n, 1))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        alone = p * np.exp((power**2 - power) / 2 * squares)
        for t in range(n - 1, -1, -1):
            joins = alone[t] * value[-1]
            now = (1 - p) * value[0] + joins
            value = np.concatenate([[now], value[:-1]])
            first[t] = joins / now
        weight = start(b, p) * value
        return Chain(float(np.log(weight.sum())), weight / weight.sum(), first, None)


def pairs(squares: Array, overlaps: Array, min_sep: int, probability: float, power: float) -> Chain:
    """Return two patterns at a time; `overlaps` are <c_t, c_{t-b+a}> by step t and wait a."""
    n, b, p = squares.size, min_sep, probability
    value, first, second = np.ones((b, b)), np.empty((n, b)), np.empty((n, b + 1))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        alone = p * np.exp((power**2 - power) / 2 * squares)
        for t in range(n - 1, -1, -1):
            before, value = value, np.empty_like(value)
            value[1:, 1:] = before[:-1, :-1]
            joins = alone[t] * np.exp(power**2 * overlaps[t, 1:]) * before[-1, :-1]
            value[0, 1:] = value[1:, 0] = (1 - p) * before[0, :-1] + joins
            none, one = (1 - p) ** 2 * before[0, 0], (1 - p) * alone[t] * before[-1, 0]
            both = alone[t] ** 2 * math.exp(min(700.0, power**2 * squares[t])) * before[-1, -1]
            value[0, 0] = none + 2 * one + both
            first[t, 1:] = joins / value[0, 1:]
            first[t, 0] = (one + both) / value[0, 0]
            second[t, 1:b] = first[t, 1:]
            second[t, 0], second[t, b] = one / (none + one), both / (one + both)
        weight = np.outer(start(b, p), start(b, p)) * value
        return Chain(float(np.log(weight.sum())), weight / weight.sum(), first, second)
