"""Copies and forks of an optimizer would give one noise to two gradients: they are refused."""

import copy
import os
import pickle

import pytest
import torch
from torch import nn

from rootnoise._check import RootnoiseError
from rootnoise.factorization import factorize
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.participation import FixedCycle
from rootnoise.participation.samplers import FixedCycleSampler
from rootnoise.training import PrivateOptimizer, privatize
from rootnoise.workload import prefix_sum

N = 24


def make(key=None, sigma=1.0):
    sampler = FixedCycleSampler(N, 4, 2, seed=0)
    split = factorize(prefix_sum(sampler.n_steps), sampler.participation, "bsr", bands=2)
    who = sampler.participation
    mechanism = Mechanism.calibrate(split, who, noise_multiplier=sigma, delta=1e-5)
    module = privatize(nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        module._module.weight.fill_(0.5)
    sgd = torch.optim.SGD(module.parameters(), lr=1.0)
    key = key or Key.fresh()
    return PrivateOptimizer(sgd, module, mechanism, sampler, key, independence="assumed")


def step(optimizer, value=1.0):
    batch = optimizer.sampler.batch(optimizer.t)
    optimizer.zero_grad()
    optimizer.module(torch.full((len(batch), 3), value)).square().sum().backward()
    optimizer.step(batch)


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies(copier):
    optimizer = make()
    for thing, name in ((optimizer, "private optimizer"), (optimizer.stream, "noise stream")):
        with pytest.raises(RootnoiseError, match=f"^{name} must not be copied or pickled, got"):
            copier(thing)


def test_a_fork_does_not_step():
    optimizer = make()
    child = os.fork()
    if child == 0:  # pragma: no cover - in the child
        try:
            step(optimizer)
        except RootnoiseError as refusal:
            os._exit(7 if "got a fork of it" in str(refusal) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    step(optimizer)


def test_another_mechanism_cannot_be_put_in():
    optimizer = make()
    with pytest.raises(AttributeError, match="mechanism"):
        optimizer.mechanism = make(sigma=0.1).mechanism
    assert optimizer.mechanism.participation == FixedCycle(6, 2)
