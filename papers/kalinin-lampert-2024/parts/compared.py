"""Methods beside each other: by how much, beyond or within one standard deviation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from parts.tables import Row, where

# A gain of mean accuracy, and its standard deviation.
Gain = tuple[float, float]


def settings_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the distinct settings, ignoring the method, in order."""
    names = ("study", "dataset", "model", "epochs", "batch_size", "n_steps", "epsilon")
    found = {tuple(row[name] for name in names): None for row in rows}
    return [dict(zip(names, values, strict=True)) for values in found]


def latest(rows: Sequence[Row]) -> list[Row]:
    """Return the last row of each method in each setting: what was tuned last."""
    last = {}
    for row in rows:
        (setting,) = settings_of([row])
        last[row["method"], *setting.values()] = row
    return list(last.values())


def gain(left: Row, right: Row) -> Gain:
    """Return how much better left is than right; of independent runs deviations add in squares."""
    deviation = float(np.hypot(left["std"] or 0, right["std"] or 0))
    return left["mean"] - right["mean"], deviation


def compare(rows: Sequence[Row], left: str, right: str) -> list[Gain]:
    """Return, for each setting with both, the gain of left over right and its deviation."""
    gains = []
    for setting in settings_of(rows):
        pair = [where(rows, method=method, **setting) for method in (left, right)]
        if all(pair):
            gains.append(gain(pair[0][-1], pair[1][-1]))
    return gains


def beyond(gains: Sequence[Gain]) -> tuple[int, int]:
    """Return how many gains are above one deviation, and how many below minus one deviation."""
    return sum(gain > dev for gain, dev in gains), sum(gain < -dev for gain, dev in gains)


@dataclass(frozen=True)
class Rivals:
    """One method of a setting, the best of all others there, and how many others those are."""

    own: Row
    best: Row
    others: int

    @property
    def gain(self) -> Gain:
        """How much better it is than the best other one, and the deviation of that."""
        return gain(self.own, self.best)

    @property
    def level(self) -> bool:
        """Whether it is better, or worse by at most one deviation."""
        difference, deviation = self.gain
        return difference >= -deviation


def rivals(rows: Sequence[Row], method: str) -> list[Rivals]:
    """Return a method beside the best other one, for each setting with both.

    Methods that are the same one in a setting have the same runs there, and are no rivals.
    """
    found = []
    for setting in settings_of(rows):
        last = {row["method"]: row for row in where(rows, **setting)}
        if method in last:
            own = last[method]
            others = {_outcome(row): row for row in last.values() if _outcome(row) != _outcome(own)}
            if others:
                best = max(others.values(), key=lambda row: row["mean"])
                found.append(Rivals(own, best, len(others)))
    return found


def _outcome(row: Row) -> tuple[Any, ...]:
    return row["mechanism"], row["sampling"], row["lr"], row["mean"], row["std"]


@lru_cache
def chance(seeds: int, others: int) -> float:
    """Return how often a method is not level with the best of others that are all equally good.

    By simulation of normal accuracies: the best of eight, chosen by the three seeds that judge it,
    is ahead by more than one deviation in 27 % of settings, by ten seeds in 1.5 %.
    """
    if seeds < 2 or not others:
        return 0.0
    drawn = np.random.default_rng(0).normal(size=(20_000, 1 + others, seeds))
    means, deviations = drawn.mean(2), drawn.std(2, ddof=1)
    every, best = np.arange(len(drawn)), 1 + means[:, 1:].argmax(1)
    allowed = np.hypot(deviations[:, 0], deviations[every, best])
    return float(np.mean(means[every, best] - means[:, 0] > allowed))
