"""Attacks on the real optimizer: canaries that are in or out, scored by the best statistic.

The model is linear with loss sum, so that a person's gradient is their input: each canary has a
coordinate of the gradient to itself, three times the clip norm long, and takes part as the worst
person may. The attacker sees every noised gradient (white box), knows the mechanism, and not the
key. Canaries do not disturb each other: one run is as many independent trials as it has canaries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import nn

from rootnoise import _limits
from rootnoise._check import Array, RootnoiseError, integer
from rootnoise.auditing.recompute import DENSE, strategy_of
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.noise import NoiseStream
from rootnoise.participation import (
    BallsInBins,
    CyclicPoisson,
    FixedCycle,
    MinSeparation,
    MinSepPoisson,
)
from rootnoise.participation.samplers import BallsInBinsSampler, CyclicPoissonSampler, Sampler
from rootnoise.training import PrivateOptimizer, privatize

# A covariance of n steps is learned from at least so many times n canaries that are out.
LEARN = 20
# Part of the largest variance below which a direction counts as free of noise.
FREE = 1e-6
# More would take hours, and 24 TB.
MOST_CANARIES = 1_000_000


@dataclass(frozen=True)
class Trials:
    """The scores of one run: high where a canary seems to be in.

    Attributes:
        scores: one a canary.
        member: whether it was in.
    """

    scores: Array
    member: NDArray[np.bool_]


class Worst(Sampler):
    """Everybody follows the one pattern of steps that moves C X the most, of those tried."""

    def __init__(self, mechanism: Mechanism, n_examples: int) -> None:
        self.participation = mechanism.participation
        self.steps = worst_pattern(mechanism)
        super().__init__(n_examples, n_examples, mechanism.n_steps, seed=0)

    def _assign(self) -> None:
        """Nothing is random."""

    def _batch(self, t: int) -> NDArray[np.int64]:
        return np.arange(self.n_examples if t in self.steps else 0)


def worst_pattern(mechanism: Mechanism) -> NDArray[np.int64]:
    """Return the steps i, i + b, i + 2b, ... of one person, with the i that moves C X the most."""
    p, n = mechanism.participation, mechanism.n_steps
    k = p.max_participations if isinstance(p, FixedCycle | MinSeparation) else 1
    b = p.min_sep if isinstance(p, FixedCycle | MinSeparation) else n
    starts = range(b if isinstance(p, FixedCycle) else n - (k - 1) * b)
    patterns = [np.arange(i, n, b)[:k] for i in starts]
    u = np.zeros((n, len(patterns)))
    for column, pattern in enumerate(patterns):
        u[pattern, column] = 1.0
    return patterns[int(np.argmax(np.linalg.norm(mechanism.strategy.apply(u), axis=0)))]


def sampler_of(mechanism: Mechanism, canaries: int, seed: int) -> Sampler:
    """Return the sampler of an attack: the real one where steps are drawn, else `Worst`.

    Raises:
        RootnoiseError: a sampling probability that no set of at most 100 times `canaries` has, or
            b-min-sep Poisson sampling.
    """
    p, n = mechanism.participation, mechanism.n_steps
    if isinstance(p, MinSepPoisson):
        raise RootnoiseError(f"participation must be one that can be attacked, got {p.type}")
    if isinstance(p, BallsInBins):
        size = -(-canaries // p.period)
        return BallsInBinsSampler(size * p.period, size, p.epochs, seed, n)
    if not isinstance(p, CyclicPoisson):
        return Worst(mechanism, canaries)
    for size in range(max(canaries, p.groups), 100 * canaries):
        batch = round(p.probability * size / p.groups)
        if batch and batch * p.groups / size == p.probability:
            return CyclicPoissonSampler(size, batch, n, p.groups, seed)
    raise RootnoiseError(
        f"probability must be batch size * groups / examples, for at most {100 * canaries} "
        f"examples, got {p.probability}"
    )


Stream = Callable[[Mechanism, int, Key], NoiseStream]


class Attack:
    """Runs of the private optimizer, each canary in by a fair coin, and a score for each.

    Where the canaries are many times the steps, the covariance of the release is not believed but
    learned from a run that none is in: noise that is too weak, or used twice, shows.

    Args:
        claimed: what the attacker is told.
        canaries: people with a coordinate each.
        seed: fixes coins, samplers and keys; of the attack, nothing that is released.
        run: the mechanism that really runs, `claimed` unless a test breaks it.
        stream: makes the noise that is really added, likewise.
        on_step: called after every step of every run.

    Raises:
        RootnoiseError: fewer than 20 canaries, too many steps, or a sampling probability that
            `sampler_of` refuses.
    """

    def __init__(
        self,
        claimed: Mechanism,
        canaries: int = 4000,
        seed: int = 0,
        *,
        run: Mechanism | None = None,
        stream: Stream | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.claimed, self.run, self.stream = claimed, run or claimed, stream
        self._on_step = on_step
        self.canaries = integer("canaries", integer("canaries", canaries, 20), high=MOST_CANARIES)
        self.seed = integer("seed", seed, 0)
        n = integer("n_steps", claimed.n_steps, 1, DENSE)
        # Measured: inputs and gradients of all canaries at once, and all releases.
        _limits.memory(f"{canaries} canaries", 24.0 * canaries**2 + 64.0 * n * canaries, "a few")
        sampler = sampler_of(self.run, canaries, seed)
        key = Key.from_seed(seed).derive("nobody")
        self.noise = self._release(sampler, np.zeros(canaries, bool), key)
        c = strategy_of(claimed) / claimed.noise_std
        learned = canaries >= LEARN * n
        self._precision = _learned_precision(self.noise) if learned else c.T @ c
        self._white = c @ self.noise

    def trials(self, number: int) -> Trials:
        """Make one more run, with coins, batches and key of its own, and score its canaries."""
        key = Key.from_seed(self.seed).derive(f"run {number}")
        member = key.derive("coins").generator().random(self.canaries) < 0.5
        sampler = sampler_of(self.run, self.canaries, self.seed + 1 + number)
        release = self._release(sampler, member, key)
        return Trials(_scores(self.claimed, sampler, self._precision, release), member)

    def _release(self, sampler: Sampler, member: NDArray[np.bool_], key: Key) -> Array:
        return _release(self.run, sampler, member, key, self.stream, self._on_step)

    def variance(self) -> tuple[float, float]:
        """Return the variance of C X over the claimed one, and its deviations from 1.

        The run that no canary is in is noise alone: C X / noise_std is n x canaries standard
        normals if the engine keeps its word, and their squares have mean 1 and variance 2.
        """
        ratio = float(np.square(self._white).mean())
        return ratio, (ratio - 1) / float(np.sqrt(2 / self._white.size))

    def correlation(self) -> tuple[float, float]:
        """Return the largest correlation of two steps of C X / noise_std, and its deviations."""
        x = self._white / np.linalg.norm(self._white, axis=1, keepdims=True)
        off = x @ x.T - np.eye(len(x))
        worst = float(np.abs(off).max())
        return worst, worst * float(np.sqrt(self.canaries))


def _release(
    mechanism: Mechanism,
    sampler: Sampler,
    member: NDArray[np.bool_],
    key: Key,
    stream: Stream | None,
    on_step: Callable[[], None],
) -> Array:
    """Return the noised gradient sums, (n_steps, canaries), as the optimizer made them."""
    m = len(member)
    torch_member = torch.from_numpy(member)
    module = privatize(nn.Linear(m, 1, bias=False), "sum")
    sgd = torch.optim.SGD(module.parameters(), lr=1.0)
    optimizer = PrivateOptimizer(sgd, module, mechanism, sampler, key, planned=True)
    if stream is not None:
        optimizer._stream = stream(mechanism, m, key)
    (weight,) = module.parameters()
    rows = []
    for batch in sampler:
        optimizer.zero_grad()
        if batch.size:
            people = torch.from_numpy(batch)
            x = torch.zeros(batch.size, m)
            own = people < m  # the others' gradients are zero
            place = people[own]
            x[own.nonzero()[:, 0], place] = 3 * mechanism.clip_norm * torch_member[place].float()
            module(x).sum().backward()
        optimizer.step(batch)
        on_step()
        assert weight.grad is not None  # noqa: S101 - the optimizer has just set it
        rows.append(weight.grad.flatten().double().numpy() * sampler.batch_size)

    return np.array(rows)


def _learned_precision(release: Array) -> Array:
    """Return the inverse covariance of the steps; a direction without noise weighs very much."""
    values, vectors = np.linalg.eigh(release @ release.T / release.shape[1])
    inverse = 1 / np.maximum(values, FREE * values.max())
    return np.asarray((vectors * inverse) @ vectors.T)


def _scores(mechanism: Mechanism, sampler: Sampler, precision: Array, release: Array) -> Array:
    """Return log likelihood ratios of "in" against "out", for one who knows no coin of the sampler.

    Steps drawn independently have orthogonal columns (Choquette-Choo et al. 2023, Theorem 4): the
    ratio is a product over a person's possible steps.
    """
    p, clip = mechanism.participation, mechanism.clip_norm
    matched = clip * (precision @ release)
    m = release.shape[1]
    if isinstance(p, CyclicPoisson):
        length = clip**2 * np.diag(precision)[:, None]
        each = np.log1p(p.probability * np.expm1(np.minimum(matched - length / 2, 700)))
        turn = np.zeros((len(release), m))
        assert isinstance(sampler, CyclicPoissonSampler)  # noqa: S101 - for the type checker
        for g, part in enumerate(sampler._parts):
            turn[g :: p.groups, part[part < m]] = 1.0
        return np.asarray((each * turn).sum(0))
    if isinstance(p, BallsInBins):
        n = mechanism.n_steps
        comb = (np.arange(n)[:, None] % p.period == np.arange(p.period)).astype(np.float64)
        lengths = np.einsum("si,st,ti->i", comb, precision, comb) * clip**2
        return np.asarray(special.logsumexp(comb.T @ matched - lengths[:, None] / 2, axis=0))
    return np.asarray(matched[worst_pattern(mechanism)].sum(0))
