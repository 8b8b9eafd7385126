"""Batches as a pure function of (seed, step).

The accountant reads `sampler.participation`, the same value the sampler draws by, so that the two
cannot drift apart.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rootnoise._check import RootnoiseError, integer, same
from rootnoise.keys import Key
from rootnoise.participation import (
    BallsInBins,
    CyclicPoisson,
    FixedCycle,
    MinSeparation,
    MinSepPoisson,
    Participation,
    to_dict,
)

Indices = NDArray[np.int64]


class Sampler(ABC):
    """Batches 0 .. n_steps - 1 of sorted int64 example indices; iterating yields them in order.

    A sampler stays as it was made; only its seed is replaced, by `load_state_dict`.

    Attributes:
        n_examples: size of the data set.
        batch_size: expected size of a batch and always the divisor of the mean gradient.
        n_steps: how many batches there are.
        participation: who may appear when; what the accountant reads.
        seed: fixes all batches. Where `participation.amplified` it is a secret: the amplification
            holds only against those who cannot tell who was drawn.
    """

    participation: Participation
    seed: int

    def __init__(self, n_examples: int, batch_size: int, n_steps: int, seed: int | None) -> None:
        self.n_examples, self.batch_size = _sizes(n_examples, batch_size)
        self.n_steps = integer("n_steps", n_steps, 1)
        self.participation.validate(self.n_steps)
        self._seed(secrets.randbits(128) if seed is None else integer("seed", seed, 0))
        self._sealed = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse another public value, or another method, once the sampler is made."""
        public = not name.startswith("_") or hasattr(type(self), name)
        if public and vars(self).get("_sealed"):
            raise RootnoiseError(
                f"{name} of a sampler must stay as it was made, got {value!r:.80}: make a new one"
            )
        object.__setattr__(self, name, value)

    @abstractmethod
    def _assign(self) -> None:
        """Make what the seed fixes for all steps."""

    @abstractmethod
    def _batch(self, t: int) -> Indices:
        """Return the sorted batch of a step in range."""

    def _seed(self, seed: int) -> None:
        vars(self)["seed"] = seed
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


class _CycleSampler(Sampler):
    """Every epoch has the same period = ceil(n_examples / batch_size) batches."""

    participation: FixedCycle
    _kind: ClassVar[type[FixedCycle]]

    def __init__(
        self,
        n_examples: int,
        batch_size: int,
        epochs: int,
        seed: int | None = None,
        n_steps: int | None = None,
    ) -> None:
        size, batch = _sizes(n_examples, batch_size)
        self.participation = self._kind(-(-size // batch), epochs)
        if n_steps is None:
            n_steps = self.participation.period * self.participation.epochs
        super().__init__(size, batch, n_steps, seed)


class FixedCycleSampler(_CycleSampler):
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

    _kind = FixedCycle

    def _assign(self) -> None:
        self._order = self._permutation()

    def _batch(self, t: int) -> Indices:
        start = t % self.participation.period * self.batch_size
        return np.sort(self._order[start : start + self.batch_size])


class MinSeparationSampler(Sampler):
    """Every epoch takes every example once, in an order of its own, at least `min_sep` steps apart.

    The epoch's period = ceil(n_examples / batch_size) steps are cut into stretches of
    period - min_sep + 1. Each example keeps its stretch, which every epoch shuffles anew. A
    separation of 1 is a new shuffle of everything; that of the whole period is a fixed cycle.

    Args:
        n_examples: size of the data set.
        batch_size: examples a step; only the last batch of a stretch may be smaller.
        epochs: how often each example may appear.
        min_sep: least steps between two of one example, at most the period.
        seed: fixes the orders; from OS entropy when None.
        n_steps: steps to make, inside the last epoch; all period * epochs when None.

    Raises:
        RootnoiseError: a number out of its range.

    >>> sampler = MinSeparationSampler(n_examples=12, batch_size=3, epochs=2, min_sep=3, seed=0)
    >>> sampler.participation
    MinSeparation(min_sep=3, max_participations=2)
    """

    participation: MinSeparation

    def __init__(
        self,
        n_examples: int,
        batch_size: int,
        epochs: int,
        min_sep: int,
        seed: int | None = None,
        n_steps: int | None = None,
    ) -> None:
        size, batch = _sizes(n_examples, batch_size)
        period = FixedCycle(-(-size // batch), epochs).period
        separation = integer("min_sep", min_sep, 1, period, high_name="ceil(n_examples/batch_size)")
        self.participation = MinSeparation(separation, epochs)
        self._period, self._stretch = period, period - separation + 1
        self._held: tuple[int, int, Indices] | None = None
        steps = period * epochs if n_steps is None else n_steps
        FixedCycle(period, epochs).validate(integer("n_steps", steps, 1))
        super().__init__(size, batch, steps, seed)

    def _assign(self) -> None:
        self._order, self._held = self._permutation(), None
        self._shuffles = self._key.derive("epochs")

    def _batch(self, t: int) -> Indices:
        epoch, i = divmod(t, self._period)
        stretch, place = divmod(i, self._stretch)
        start = place * self.batch_size
        return np.sort(self._shuffled(epoch, stretch)[start : start + self.batch_size])

    def _shuffled(self, epoch: int, stretch: int) -> Indices:
        """Return the order of one stretch in one epoch; the last one is cached."""
        if self._held is None or self._held[:2] != (epoch, stretch):
            size = self._stretch * self.batch_size
            members = self._order[stretch * size : (stretch + 1) * size]
            order = self._shuffles.generator(epoch, stretch).permutation(members)
            self._held = epoch, stretch, order
        return self._held[2]


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


class BallsInBinsSampler(_CycleSampler):
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

    _kind = BallsInBins

    def _assign(self) -> None:
        period = self.participation.period
        bins = self._key.derive("bins").generator().integers(period, size=self.n_examples)
        # Stable: within a bin the examples stay in order.
        self._order = np.argsort(bins, kind="stable")
        self._starts = np.searchsorted(bins[self._order], np.arange(period + 1))

    def _batch(self, t: int) -> Indices:
        i = t % self.participation.period
        return self._order[self._starts[i] : self._starts[i + 1]].copy()


class MinSepPoissonSampler(Sampler):
    """Whoever sat out the last `min_sep` - 1 steps joins the next with a fixed probability.

    Dong & Ganesh (2026). Examples are independent: after a step each waits min_sep - 1 steps, and
    then a geometrically distributed time. All times are drawn at the start, as if the run had
    gone on forever before it, and take 8 bytes for each time that an example takes part. Batches
    vary in size and can be empty.

    Args:
        n_examples: size of the data set.
        batch_size: expected examples a step; batch_size * min_sep <= n_examples.
        n_steps: steps to make.
        min_sep: least steps between two of one example.
        seed: fixes all draws; from OS entropy when None. Keep it secret, see `Sampler`.

    Raises:
        RootnoiseError: a number out of its range.

    >>> sampler = MinSepPoissonSampler(100, batch_size=10, n_steps=40, min_sep=6, seed=0)
    >>> sampler.participation
    MinSepPoisson(min_sep=6, probability=0.2)
    """

    participation: MinSepPoisson

    def __init__(
        self,
        n_examples: int,
        batch_size: int,
        n_steps: int,
        min_sep: int,
        seed: int | None = None,
    ) -> None:
        size, batch = _sizes(n_examples, batch_size)
        taken = batch * integer("min_sep", min_sep, 1)
        if taken > size:
            raise RootnoiseError(
                f"batch_size * min_sep must be <= n_examples={size} for a sampling probability of "
                f"at most 1, got {batch} * {min_sep}"
            )
        # rate = batch / size = p / (1 + (b - 1) p)
        self.participation = MinSepPoisson(min_sep, batch / (size - (taken - batch)))
        super().__init__(size, batch, n_steps, seed)

    def _assign(self) -> None:
        b, p = self.participation.min_sep, self.participation.probability
        rng = self._key.derive("waits").generator()
        # Stationary: no wait with probability rate / p, else one of 1, ..., b - 1 steps.
        waits = rng.random(self.n_examples) * (1 + (b - 1) * p) - 1
        step = np.ceil(np.maximum(waits, 0.0) / p).astype(np.int64).clip(0, b - 1)
        who = np.arange(self.n_examples)
        everyone, steps = [], []
        while who.size:
            step = step + rng.geometric(p, who.size) - 1
            who, step = who[step < self.n_steps], step[step < self.n_steps]
            everyone.append(who)
            steps.append(step)
            step = step + b
        members, when = np.concatenate(everyone), np.concatenate(steps)
        # By step, and by example within a step.
        self._members = members[np.lexsort((members, when))]
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(when, minlength=self.n_steps))])

    def _batch(self, t: int) -> Indices:
        return self._members[self._starts[t] : self._starts[t + 1]].copy()


class OwnBatches(Sampler):
    """Says that the batches are the user's own: the ledger alone holds them to the participation.

    Only for participations that restrict who appears when and nothing else: these a ledger can hold
    a list of batches to. Amplification needs batches drawn by one of the samplers above.

    Args:
        participation: single, min-sep or fixed-cycle.
        n_examples: size of the data set.
        batch_size: the divisor of the mean gradient, whatever size a batch has.
        n_steps: steps to make.

    Raises:
        RootnoiseError: an amplified participation, a number out of its range, or a call of `batch`.

    >>> from rootnoise.participation import SingleParticipation
    >>> own = OwnBatches(SingleParticipation(), n_examples=100, batch_size=10, n_steps=10)
    >>> own.batch(0)
    Traceback (most recent call last):
    rootnoise._check.RootnoiseError: batches must come from the user of OwnBatches, got a call for \
the one of step 0
    """

    def __init__(
        self, participation: Participation, n_examples: int, batch_size: int, n_steps: int
    ) -> None:
        if participation.amplified:
            raise RootnoiseError(
                "participation must be single, min-sep or fixed-cycle for own batches, got "
                f"{participation.type}: its epsilon needs batches that its sampler draws"
            )
        self.participation = participation
        super().__init__(n_examples, batch_size, n_steps, seed=0)

    def _assign(self) -> None:
        """Nothing is random."""

    def _batch(self, t: int) -> Indices:
        raise RootnoiseError(
            f"batches must come from the user of OwnBatches, got a call for the one of step {t}"
        )


# Samplers that draw as an amplified epsilon assumes. A subclass may draw otherwise: only these very
# types count.
DRAWN = (CyclicPoissonSampler, BallsInBinsSampler, MinSepPoissonSampler)


def check_sampler(sampler: Sampler, participation: Participation, n_steps: int) -> None:
    """Refuse a sampler that does not draw as a mechanism's epsilon assumes.

    Raises:
        RootnoiseError: another participation or number of steps, or an amplified participation
            under a sampler of another type than ours, a subclass included.
    """
    if participation != sampler.participation:
        raise RootnoiseError(
            f"sampler must draw by the mechanism's participation, {participation}; "
            f"got {sampler.participation}"
        )
    if participation.amplified and type(sampler) not in DRAWN:
        raise RootnoiseError(
            f"sampler must be one of {[kind.__name__ for kind in DRAWN]} for the amplified "
            f"participation {participation.type}, got {type(sampler).__name__}"
        )
    integer("sampler's n_steps", sampler.n_steps, n_steps, n_steps)
