"""Batches as a pure function of (seed, step), and the ledger that holds them to a Participation.

The accountant reads `sampler.participation`, the same value the sampler draws by, so that the two
cannot drift apart. The ledger checks every batch, whoever made it, before its gradient is computed.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rootnoise._check import RootnoiseError, integer, same
from rootnoise.participation import (
    CyclicPoisson,
    FixedCycle,
    MinSeparation,
    Participation,
    SingleParticipation,
    to_dict,
)
from rootnoise.randomness import Key

if TYPE_CHECKING:
    import torch

Indices = NDArray[np.int64]


class Sampler(ABC):
    """Batches 0 .. n_steps - 1 of sorted int64 example indices; iterating yields them in order.

    Attributes:
        n_examples: size of the data set.
        batch_size: expected size of a batch and always the divisor of the mean gradient.
        n_steps: how many batches there are.
        participation: who may appear when; what the accountant reads.
        seed: fixes all batches. For Poisson sampling it is a secret: the privacy amplification
            holds only against those who cannot tell who was drawn.
    """

    participation: Participation

    def __init__(self, n_examples: int, batch_size: int, n_steps: int, seed: int | None) -> None:
        self.n_examples, self.batch_size = _sizes(n_examples, batch_size)
        self.n_steps = integer("n_steps", n_steps, 1)
        self.participation.validate(self.n_steps)
        self._seed(secrets.randbits(128) if seed is None else integer("seed", seed, 0))

    @abstractmethod
    def _shuffle(self, permutation: Indices) -> None:
        """Take the random order of the examples that the seed gives."""

    @abstractmethod
    def _batch(self, t: int) -> Indices:
        """Return the sorted batch of a step in range."""

    def _seed(self, seed: int) -> None:
        self.seed = seed
        self._key = Key.from_seed(seed).derive(f"sampler {self.participation.type}")
        self._shuffle(self._key.derive("shuffle").generator().permutation(self.n_examples))

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

    def _shuffle(self, permutation: Indices) -> None:
        self._order = permutation

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

    def _shuffle(self, permutation: Indices) -> None:
        parts = np.array_split(permutation, self.participation.groups)
        self._parts = [np.sort(part) for part in parts]
        self._draws = self._key.derive("draws")

    def _batch(self, t: int) -> Indices:
        part = self._parts[t % self.participation.groups]
        return part[self._draws.generator(t).random(part.size) < self.participation.probability]


class Ledger:
    """Counts every example's appearances and refuses a batch that breaks the participation.

    `admit` comes before the gradient of the batch is computed. Memory is two int32 arrays of
    `n_examples`.

    >>> ledger = Ledger(MinSeparation(min_sep=2, max_participations=5), n_examples=4)
    >>> ledger.admit(0, [0, 1])
    >>> ledger.admit(1, [1, 2])
    Traceback (most recent call last):
    rootnoise._check.RootnoiseError: example 1 at step 1 breaks the participation (at most 5 steps \
each, at least 2 apart): steps so far 1, the last one 0
    """

    def __init__(self, participation: Participation, n_examples: int) -> None:
        self.participation = participation
        self.n_examples = integer("n_examples", n_examples, 1)
        self.t = 0
        self._least, self._modulus, self._most = _rule(participation)
        self._last = np.zeros(self.n_examples, dtype=np.int32)
        self._count = np.zeros(self.n_examples, dtype=np.int32)

    def admit(self, t: int, indices: ArrayLike) -> None:
        """Record that the examples `indices` take part in step t; nothing is recorded on refusal.

        Args:
            t: the step; it must be the one after the last admitted step, 0 at first.
            indices: distinct integers in [0, n_examples), in any order; none is a legal batch.

        Raises:
            RootnoiseError: another step, bad indices, or an example that may not appear in step t.
        """
        if integer("t", t) != self.t:
            raise RootnoiseError(f"step must be the next one, {self.t} (once, in order), got {t}")
        batch = self._checked(indices)
        last, count = self._last[batch], self._count[batch]
        gap = self.t - last
        broken = (gap < self._least) | (gap % self._modulus != 0) | (count >= self._most)
        broken &= count > 0  # whoever was never drawn may join at any step
        if broken.any():
            i = int(np.argmax(broken))
            raise RootnoiseError(
                f"example {batch[i]} at step {t} breaks the participation ({self.participation}): "
                f"steps so far {count[i]}, the last one {last[i]}"
            )
        self._last[batch] = self.t
        self._count[batch] += 1
        self.t += 1

    def _checked(self, indices: ArrayLike) -> Indices:
        """Return the indices sorted, or refuse them."""
        raw = np.asarray(indices)
        if raw.ndim != 1 or (raw.size and not np.issubdtype(raw.dtype, np.integer)):
            raise RootnoiseError(
                f"indices must be 1-D integers, got {raw.dtype} of shape {raw.shape}"
            )
        batch = np.sort(raw)
        if batch.size and (batch[0] < 0 or batch[-1] >= self.n_examples):
            bad = batch[0] if batch[0] < 0 else batch[-1]
            raise RootnoiseError(f"indices must be in [0, n_examples={self.n_examples}), got {bad}")
        batch = batch.astype(np.int64)
        twice = batch[1:][batch[1:] == batch[:-1]]
        if twice.size:
            raise RootnoiseError(f"indices must be distinct within a batch, got {twice[0]} twice")
        return batch

    def _identity(self) -> dict[str, Any]:
        return {
            "version": 1,
            "participation": to_dict(self.participation),
            "n_examples": self.n_examples,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives that `torch.load(weights_only=True)` reads."""
        import torch  # here: planning needs samplers, but no torch

        tensors = {"last_step": self._last, "count": self._count}
        copies = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
        return self._identity() | {"t": self.t} | copies

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved ledger; only a fresh one can, for what was admitted stays admitted.

        Raises:
            RootnoiseError: this ledger has admitted a step, or the saved one is not its like.
        """
        if self.t:
            raise RootnoiseError(f"ledger must be at step 0 to load a state, got step {self.t}")
        same("ledger", self._identity(), state)
        t = integer("saved ledger's t", state.get("t", -1), 0)
        last = self._restored("last_step", state.get("last_step"), max(t - 1, 0))
        self._count = self._restored("count", state.get("count"), t)
        self.t, self._last = t, last

    def _restored(self, name: str, tensor: torch.Tensor | None, most: int) -> NDArray[np.int32]:
        array: NDArray[Any] = np.empty(0) if tensor is None else tensor.numpy().copy()
        sound = array.dtype == np.int32 and array.shape == (self.n_examples,)
        if not sound or array.min() < 0 or array.max() > most:
            raise RootnoiseError(
                f"saved ledger's {name} must be {self.n_examples} int32 values in [0, {most}], "
                f"got {array.dtype} of shape {array.shape}, or values out of range"
            )
        return array


def _rule(participation: Participation) -> tuple[int, int, float]:
    """Return the least gap and the divisor of all gaps of one example, and its most appearances."""
    match participation:
        case SingleParticipation():
            return 1, 1, 1
        case MinSeparation(min_sep, most):
            return min_sep, 1, most
        case FixedCycle(period, epochs):
            return period, period, epochs
        case CyclicPoisson(groups, _):
            return groups, groups, np.inf
    raise RootnoiseError(f"participation must be a known kind, got {participation!r}")
