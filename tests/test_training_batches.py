"""Which batches a private step takes: the sampler's, or declared ones that the ledger can check."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import parallel_runs
from processes import launch
from rootnoise._check import RootnoiseError
from rootnoise.factorization import factorize
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.participation import BallsInBins, CyclicPoisson, MinSepPoisson, SingleParticipation
from rootnoise.participation.samplers import (
    BallsInBinsSampler,
    CyclicPoissonSampler,
    FixedCycleSampler,
    MinSeparationSampler,
    MinSepPoissonSampler,
    OwnBatches,
)
from rootnoise.runs.config import RunConfig, make_sampler
from rootnoise.training import PrivateOptimizer, privatize
from rootnoise.workload import prefix_sum

N, STEPS = 24, 12
SAMPLERS = {
    "poisson": lambda seed=1: CyclicPoissonSampler(N, 4, STEPS, seed=seed),
    "balls-in-bins": lambda seed=1: BallsInBinsSampler(N, 4, 2, seed=seed),
    "min-sep-poisson": lambda seed=1: MinSepPoissonSampler(N, 4, STEPS, 2, seed=seed),
    "fixed-cycle": lambda seed=1: FixedCycleSampler(N, 4, 2, seed=seed),
    "min-sep": lambda seed=1: MinSeparationSampler(N, 4, 2, 2, seed=seed),
}
AMPLIFIED = ("poisson", "balls-in-bins", "min-sep-poisson")


def private(sampler):
    split = factorize(prefix_sum(sampler.n_steps), sampler.participation, "identity")
    mechanism = Mechanism.calibrate(split, sampler.participation, noise_multiplier=1.0, delta=1e-5)
    module = privatize(nn.Linear(2, 1, bias=False), "sum")
    nn.init.zeros_(module._module.weight)
    sgd = torch.optim.SGD(module.parameters(), lr=1.0)
    return PrivateOptimizer(sgd, module, mechanism, sampler, Key.from_seed(1))


def step(optimizer, batch):
    optimizer.zero_grad()
    if len(batch):
        optimizer.module(torch.ones(len(batch), 2)).sum().backward()
    optimizer.step(batch)


def refused(optimizer, batch, message):
    before = [p.detach().clone() for p in optimizer.module.parameters()]
    t = optimizer.t
    with pytest.raises(RootnoiseError, match=message):
        step(optimizer, batch)
    assert optimizer.t == optimizer.ledger.t == optimizer.stream.t == t
    assert all(map(torch.equal, before, optimizer.module.parameters()))


@pytest.mark.parametrize("kind", SAMPLERS)
def test_only_the_batch_of_the_step_is_taken(kind):
    optimizer = private(SAMPLERS[kind]())
    t = next(t for t in range(STEPS) if optimizer.sampler.batch(t).size > 1)
    for i in range(t):
        step(optimizer, optimizer.sampler.batch(i))
    batch = optimizer.sampler.batch(t)
    other = np.setdiff1d(np.arange(N), batch)[:1]
    for wrong in (batch[1:], np.append(batch[1:], other), np.append(batch, other), batch[:0]):
        # Of an example that may not appear again the ledger speaks first.
        refused(optimizer, wrong, f"batch of step {t} must be the sampler's, sampler.batch|breaks")
    step(optimizer, batch[::-1].copy())
    assert optimizer.t == t + 1


def test_ten_records_in_every_poisson_step_are_refused_at_the_first():
    """Claimed is epsilon 1 for q = 0.01; the truth would be 68."""
    optimizer = private(CyclicPoissonSampler(1000, 10, 50, seed=1))
    refused(
        optimizer,
        np.arange(10),
        r"^batch of step 0 must be the sampler's, sampler.batch\(0\), joined over ranks; got 10 "
        r"examples, \d of its \d+ \(declare batches of your own by OwnBatches\)$",
    )


def test_own_batches_are_taken_where_declared_and_held_to_the_participation():
    own = OwnBatches(SingleParticipation(), N, 4, 3)
    optimizer = private(own)
    step(optimizer, [3, 1, 7])
    refused(optimizer, [3, 2], "^example 3 at step 1 breaks the participation")
    step(optimizer, [])
    assert optimizer.t == 2
    with pytest.raises(RootnoiseError, match="must come from the user of OwnBatches, got a call"):
        own.batch(2)
    again = private(OwnBatches(SingleParticipation(), N, 4, 3))
    again.load_state_dict(optimizer.state_dict())
    refused(again, [7], "^example 7 at step 2 breaks the participation")


@pytest.mark.parametrize(
    "amplified", [CyclicPoisson(1, 0.1), BallsInBins(3, 2), MinSepPoisson(2, 0.1)]
)
def test_own_batches_are_not_amplified(amplified):
    rule = "participation must be single, min-sep or fixed-cycle for own batches, got "
    with pytest.raises(RootnoiseError, match=rule + amplified.type):
        OwnBatches(amplified, N, 4, 6)


@pytest.mark.parametrize("kind", AMPLIFIED)
def test_a_subclass_may_not_draw_under_an_amplified_participation(kind):
    honest = SAMPLERS[kind]()
    tame = type("Tame", (type(honest),), {"_batch": lambda self, t: np.arange(4)})
    sampler = copy.copy(honest)
    vars(sampler)["_sealed"] = False
    sampler.__class__ = tame
    with pytest.raises(
        RootnoiseError, match=f"^sampler must be one of .* participation .*{kind}, got Tame"
    ):
        private(sampler)


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize(
    "name", ["n_examples", "batch_size", "n_steps", "participation", "seed", "batch", "_batch"]
)
def test_a_sampler_stays_as_it_was_made(kind, name):
    sampler = SAMPLERS[kind]()
    with pytest.raises(RootnoiseError, match=f"^{name} of a sampler must stay as it was made"):
        setattr(sampler, name, 3)
    for twin in (copy.copy(sampler), pickle.loads(pickle.dumps(sampler))):  # noqa: S301 - our own
        assert all(map(np.array_equal, twin, sampler))
        with pytest.raises(RootnoiseError, match=f"^{name} of a sampler must stay"):
            setattr(twin, name, 3)
    other = SAMPLERS[kind](seed=2)
    sampler.load_state_dict(other.state_dict())
    assert sampler.seed == 2
    assert all(map(np.array_equal, sampler, other))


def test_another_sampler_put_in_later_is_refused():
    optimizer = private(SAMPLERS["poisson"]())
    optimizer.sampler = CyclicPoissonSampler(N, 8, STEPS, seed=1)
    refused(optimizer, optimizer.sampler.batch(0), "^sampler must draw by the mechanism's")
    optimizer = private(OwnBatches(SingleParticipation(), N, 4, 3))
    optimizer.sampler = OwnBatches(SingleParticipation(), N + 1, 4, 3)
    refused(optimizer, [0], r"^sampler's n_examples must be in \[24, 24\], got 25")
    optimizer.sampler = OwnBatches(SingleParticipation(), N, 4, 4)
    refused(optimizer, [0], r"^sampler's n_steps must be in \[3, 3\], got 4")


def test_ranks_join_exactly_the_sampler_s_batch(tmp_path):
    launch(2, parallel_runs.same_ten, tmp_path)
    for found in parallel_runs.results(tmp_path, 2):
        assert found["t"] == 1
        assert len(found["lines"]) == 2
        assert all("must be the sampler's, sampler.batch" in line for line in found["lines"])


@pytest.mark.parametrize("kind", SAMPLERS)
def test_seeds_have_128_bits(kind):
    """20 seeds: one has a bit length below 64 with probability 20 / 2^64."""
    seeds = {SAMPLERS[kind](seed=None).seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(64 <= seed.bit_length() <= 128 for seed in seeds)
    assert max(seed.bit_length() for seed in seeds) > 120  # else with probability 2^-160


@pytest.mark.parametrize(
    ("sampling", "bands"),
    [
        ("poisson", {"groups": 4}),
        ("balls-in-bins", {}),
        ("min-sep-poisson", {"separation": 4}),
    ],
)
def test_train_draws_by_a_secret_seed(sampling, bands):
    """A run's public seed says nothing about who was drawn."""
    config = RunConfig(sampling=sampling, seed=5, batch_size=4, epsilon=1.0, **bands)
    seeds = [make_sampler(config, 100).seed for _ in range(10)]
    assert len(set(seeds)) == 10
    assert all(seed.bit_length() >= 64 for seed in seeds)
