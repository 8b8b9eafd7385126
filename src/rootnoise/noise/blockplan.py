"""How a block of steps is computed, and which row of memory holds what.

A block maps [state; m inputs] to [m outputs; next state]. Most rows of the next state are copies:
banded inverses remember inputs, banded strategies outputs, and both keep part of the old state. A
copy is not computed, and a row that is an output, or was in the state before, is not even copied:
it stays where it lies. So a banded strategy of p bands needs max(p - 1, m) rows in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rootnoise._check import RootnoiseError

Runs = list[tuple[int, int, int]]
"""Copies of several rows at once: (first row there, first row in memory, how many)."""


# A default block is rounded up to a multiple of this, since short ones lose time between calls: a
# million values took 3.5, 3.1, 2.9 and 3.0 ms in blocks of 3, 4, 8 and 16 steps at 3 rows of state.
# For more parameters than SMALL it is not: there an unused row costs more than a short block does.
ROUND_STEPS, SMALL = 8, 2**22

# Most steps of a default block: the matrix product gains no speed beyond, and memory stays bounded.
MOST_STEPS = 64


def default_steps(ahead: int, n_steps: int, n_parameters: int, *, rounded: bool = True) -> int:
    """Return the steps of a default block that makes as many as the state has rows.

    >>> default_steps(3, 100, 10), default_steps(3, 100, 10**9), default_steps(99, 1000, 10**9)
    (8, 3, 64)
    """
    if rounded and n_parameters <= SMALL:
        ahead = -(-ahead // ROUND_STEPS) * ROUND_STEPS
    return min(max(1, ahead), MOST_STEPS, n_steps)


class BlockPlan:
    """A block, split into the rows to compute and the places of its outputs and next state.

    Places count [state (s rows); inputs (m); computed rows].

    Args:
        block: from `CausalMatrix.block`, shape (m + s, s + m).
        m: steps it makes.
        regenerate: keep no state and draw the inputs before again; only for a state that is the
            last s inputs.

    Raises:
        RootnoiseError: regenerate, but the state is something else.
    """

    def __init__(self, block: NDArray[np.float64], m: int, regenerate: bool = False) -> None:
        rows = block.astype(np.float32)
        rows += 0.0  # -0 becomes 0, so that equal rows have equal bytes
        width = block.shape[1]
        found = {row.tobytes(): i for i, row in enumerate(np.eye(width, dtype=np.float32))}
        compute: list[NDArray[np.float32]] = []
        for row in rows:
            if row.tobytes() not in found:
                found[row.tobytes()] = width + len(compute)
                compute.append(row)
        places = [found[row.tobytes()] for row in rows]
        self.m, self.s = m, width - m
        self.rows = np.array(compute, dtype=np.float32).reshape(len(compute), width)
        self.outputs, self.next_state = places[:m], places[m:]
        self.regenerates = regenerate
        if regenerate:
            if self.next_state != list(range(m, width)):
                raise RootnoiseError(
                    "memory='regenerate' must have a mechanism that remembers past draws alone "
                    "(a banded inverse), got one that remembers its noise"
                )
            self.next_state = []

    @property
    def memory_rows(self) -> int:
        """Rows that hold the next state and the outputs, each once."""
        return len({*self.next_state, *self.outputs})


@dataclass(frozen=True)
class Moves:
    """Where a block finds its rows in memory and where it leaves them."""

    reads: Runs  # the old state
    keeps: Runs  # inputs, counted with the state
    writes: Runs  # computed rows
    state: list[int]
    ready: list[int]


def moves(plan: BlockPlan, state: Sequence[int], n_rows: int) -> Moves:
    """Return the copies of a block whose old state lies in the rows `state` of n_rows.

    Rows that the next state shares with the old one stay; the others, and the outputs, go wherever
    nothing is still needed once the state has been read.
    """
    width = plan.s + plan.m
    needed = sorted({*plan.outputs, *plan.next_state})
    kept = {place: state[place] for place in needed if place < plan.s}
    free = iter(sorted(set(range(n_rows)) - set(kept.values())))
    placed = {place: next(free) for place in needed if place >= plan.s}
    where = kept | placed
    return Moves(
        reads=_runs(enumerate(state)),
        keeps=_runs((place, row) for place, row in placed.items() if place < width),
        writes=_runs((place - width, row) for place, row in placed.items() if place >= width),
        state=[where[place] for place in plan.next_state],
        ready=[where[place] for place in plan.outputs],
    )


def _runs(pairs: Iterable[tuple[int, int]]) -> Runs:
    """Join pairs in which both numbers count up."""
    runs: Runs = []
    for there, row in pairs:
        if runs and (there - runs[-1][0], row - runs[-1][1]) == (runs[-1][2],) * 2:
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((there, row, 1))
    return runs
