"""Batches as a pure function of (seed, step).

The accountant reads `sampler.participation`, the same value the sampler draws by, so that the two
cannot drift apart.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootnoise._check import RootnoiseError, integer, same
from rootnoise.participation import (
    BallsInBins,
    CyclicPoisson,
    FixedCycle,
    Participation,
    to_dict,
)
from rootnoise.randomness import Key

Indices = NDArray[np.int64]


class Sampler(ABC):
    """Batches 0 .. n_steps - 1 of sorted int64 example indices; iterating yields them in order.

    Attributes:
        n_examples: size of the data set.
        batch_size: expected size of a batch and always the divisor of the mean gradient.
        n_steps: how many batches there are.
        participation: who may appear when; what the accountant reads.
        seed: fixes all batches. Where `participation.amplified` it is a secret: the amplification
            holds only against those who cannot tell who was drawn.
    """

    participation: Participation

    def __init__(self, n_examples: int, batch_size: int, n_steps: int, seed: int | None) -> None:
        self.n_examples, self.batch_size = _sizes(n_examples, batch_size)
        self.n_steps = integer("n_steps", n_steps, 1)
        self.participation.validate(self.n_steps)
        self._seed(secrets.randbits(128) if seed is None else integer("seed", seed, 0))

    @abstractmethod
    def _assign(self) -> None:
        """Make what the seed fixes for all steps."""

    @abstractmethod
    def _batch(self, t: int) -> Indices:
        """Return the sorted batch of a step in range."""

    def _seed(self, seed: int) -> None:
        self.seed = seed
        self._key = Key.from_seed(seed).derive(f"sampler {self.participation.type}")
        self._assign()

    def _permutation(self) -> Indices:
        return self._key.derive("shuffle").generator().permutation(self.n_examples)

    def batch(self, t: int) -> Indices:
        """Return the indices of step t, sorted; it may be empty when the size is random.

        Raises:
            RootnoiseError: t is not in [0, n_steps - 1].
        """
        return self._batch(integer("t", t, 0, self.n_steps - 1, high_name="n_steps - 1"))

    def __len__(self) -> int:
        return self.n_steps

    def __iter__(self) -> Iterator[Indices]:
        return (self._batch(t) for t in range(self.n_steps))

    def _identity(self) -> dict[str, Any]:
        """What a saved sampler must agree on to be continued by this one."""
        return {
            "version": 1,
            "n_examples": self.n_examples,
            "batch_size": self.batch_size,
            "n_steps": self.n_steps,
            "participation": to_dict(self.participation),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the configuration and the seed (keep it as secret as the seed)."""
        return self._identity() | {"seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the saved seed, so that the batches are the saved run's.

        Raises:
            RootnoiseError: the saved sampler had another configuration.
        """
        same("sampler", self._identity(), state)
        self._seed(integer("saved sampler's seed", state.get("seed", -1), 0))


def _sizes(n_examples: int, batch_size: int) -> tuple[int, int]:
    size = integer("n_examples", n_examples, 1)
    return size, integer("batch_size", batch_size, 1, size, high_name="n_examples")


class FixedCycleSampler(Sampler):
    """Shuffle once, then every epoch takes the same batches in the same order.

    The cycle has period = ceil(n_examples / batch_size) steps and uses every example; its last
    batch may be smaller (the divisor stays `batch_size`). Nobody appears twice within a period.

    Args:
        n_examples: size of the data set.
        batch_size: examples a step.
        epochs: how often each example may appear.
        seed: fixes the order; from OS entropy when None.
        n_steps: steps to make, inside the last epoch; all period * epochs when None.

    Raises:
        RootnoiseError: a number out of its range.

    >>> sampler = FixedCycleSampler(n_examples=10, batch_size=4, epochs=2, seed=0)
    >>> sampler.participation
    FixedCycle(period=3, epochs=2)
    >>> [batch.size for batch in sampler]
    [4, 4, 2, 4, 4, 2]
    """

    participation: FixedCycle

    def __init__(
        self,
        n_examples: int,
        batch_size: int,
        epochs: int,
        seed: int | None = None,
        n_steps: int | None = None,
    ) -> None:
        size, batch = _sizes(n_examples, batch_size)
        self.participation = FixedCycle(-(-size // batch), epochs)
        if n_steps is None:
            n_steps = self.participation.period * self.participation.epochs
        super().__init__(size, batch, n_steps, seed)

    def _assign(self) -> None:
        self._order = self._permutation()

    def _batch(self, t: int) -> Indices:
        start = t % self.participation.period * self.batch_size
        return np.sort(self._order[start : start + self.batch_size])


class CyclicPoissonSampler(Sampler):
    """Poisson sampling from one part of the data a step (Choquette-Choo et al., 2023, Theorem 4).

    A random partition, fixed by the seed, puts the examples in `groups` parts of near-equal size.
    Step t takes every member of part t % groups independently with probability
    q = batch_size * groups / n_examples, the same q that `participation` gives the accountant.
    groups = 1 is plain Poisson sampling. Batches vary in size and can be empty.

    Args:
        n_examples: size of the data set.
        batch_size: expected examples a step; batch_size * groups <= n_examples.
        n_steps: steps to make.
        groups: parts of the data.
        seed: fixes partition and draws; from OS entropy when None. Keep it secret, see `Sampler`.

    Raises:
        RootnoiseError: a number out of its range.

    >>> sampler = CyclicPoissonSampler(n_examples=100, batch_size=5, n_steps=40, groups=4, seed=0)
    >>> sampler.participation
    CyclicPoisson(groups=4, probability=0.2)
    """

    participation: CyclicPoisson

    def __init__(
        self,
        n_examples: int,
        batch_size: int,
        n_steps: int,
        groups: int = 1,
        seed: int | None = None,
    ) -> None:
        size, batch = _sizes(n_examples, batch_size)
        drawn = batch * integer("groups", groups, 1)
        if drawn > size:
            raise RootnoiseError(
                f"batch_size * groups must be <= n_examples={size} for a sampling probability "
                f"of at most 1, got {batch} * {groups}"
            )
        self.participation = CyclicPoisson(groups, drawn / size)
        super().__init__(size, batch, n_steps, seed)

    def _assign(self) -> None:
        parts = np.array_split(self._permutation(), self.participation.groups)
        self._parts = [np.sort(part) for part in parts]
        self._draws = self._key.derive("draws")

    def _batch(self, t: int) -> Indices:
        part = self._parts[t % self.participation.groups]
        return part[self._draws.generator(t).random(part.size) < self.participation.probability]


class BallsInBinsSampler(Sampler):
    """Every example falls into one of the bins, and every epoch takes the bins in the same order.

    Bins are drawn independently and uniformly (Choquette-Choo et al., 2024), so that their sizes
    vary and a bin can be empty. There are period = ceil(n_examples / batch_size) of them; all
    examples are used, once an epoch.

    Args:
        n_examples: size of the data set.
        batch_size: expected examples a step, up to rounding; the divisor of the mean gradient.
        epochs: how often each example takes part.
        seed: fixes the bins; from OS entropy when None. Keep it secret, see `Sampler`.
        n_steps: steps to make, inside the last epoch; all period * epochs when None.

    Raises:
        RootnoiseError: a number out of its range.

    >>> sampler = BallsInBinsSampler(n_examples=10, batch_size=4, epochs=2, seed=0)
    >>> sampler.participation
    BallsInBins(period=3, epochs=2)
    >>> [batch.tolist() for batch in sampler][:3] == [batch.tolist() for batch in sampler][3:]
    True
    """

    participation: BallsInBins

    def __init__(
        self,
        n_examples: int,
        batch_size: int,
        epochs: int,
        seed: int | None = None,
        n_steps: int | None = None,
    ) -> None:
        size, batch = _sizes(n_examples, batch_size)
        self.participation = BallsInBins(-(-size // batch), epochs)
        if n_steps is None:
            n_steps = self.participation.period * self.participation.epochs
        super().__init__(size, batch, n_steps, seed)

    def _assign(self) -> None:
        period = self.participation.period
        bins = self._key.derive("bins").generator().integers(period, size=self.n_examples)
        # Stable: within a bin the examples stay in order.
        self._order = np.argsort(bins, kind="stable")
        self._starts = np.searchsorted(bins[self._order], np.arange(period + 1))

    def _batch(self, t: int) -> Indices:
        i = t % self.participation.period
        return self._order[self._starts[i] : self._starts[i + 1]].copy()
