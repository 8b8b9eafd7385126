"""The study behind the planner's objective trains as the library does, and judges by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rootnoise import Key, Mechanism, PrivateOptimizer, privatize

PATH = Path(__file__).parents[1] / "benchmarks" / "prediction.py"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("prediction", PATH)
    made = importlib.util.module_from_spec(spec)
    sys.modules["prediction"] = made
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize("hidden", [0, 7])
@pytest.mark.parametrize("label", ["bandmf", "banded, Poisson 1/2"])
def test_a_run_is_that_of_the_private_optimizer(study, hidden, label):
    """The same batches, noise and weights: parameters agree to float32 after every step."""
    task = study.Task("made up", 60, hidden, 10, 3, 0.8)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=rng)
    y = torch.randint(0, 10, (60,), generator=rng)
    job, method = task.job(), study.METHODS[label]
    who = method.who(job)
    split, sampler = method.split(task), job.sampler(who, seed=3)
    mechanism = Mechanism.calibrate(split, who, noise_multiplier=1.0, delta=1e-5)
    with torch.random.fork_rng():
        torch.random.manual_seed(4)
        layers = [nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 10)] if hidden else [nn.Linear(5, 10)]
    model = privatize(nn.Sequential(*layers))
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.8)
    optimizer = PrivateOptimizer(sgd, model, mechanism, sampler, Key.from_seed(5))
    rates, noise = torch.tensor([0.4, 0.05]), torch.tensor([3.0, 1.0])
    runs = study.Runs(5, hidden, noise, rates, 0.8, seed=4)
    stream = study.NoiseStream(mechanism, runs.n_parameters, Key.from_seed(5))
    for t in range(sampler.n_steps):
        batch = torch.from_numpy(sampler.batch(t))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step(batch)
        runs.step(x[batch], y[batch], stream.next(), 10)
        ours = torch.cat([p.detach().flatten() for p in sgd.param_groups[0]["params"]])
        torch.testing.assert_close(runs.flat(1), ours, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(runs.flat(0), ours, atol=0.1)


def test_rates_are_chosen_on_the_half_that_does_not_judge(study):
    right = np.zeros((2, len(study.EPSILONS), len(study.RATES)))
    right[0, :, 3], right[1, :, 3] = 0.9, 0.6  # best on the first half, judged 0.6
    right[1, :, 5], right[0, :, 5] = 0.8, 0.2  # best on the second, judged 0.2
    found = study.reached([{"last": {"accuracy": right.tolist()}}], "last")
    np.testing.assert_allclose(found, 0.4)
