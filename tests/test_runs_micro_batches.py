"""Runs in micro-batches: the same run, in the memory that there is."""

import copy
import dataclasses
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from rootnoise import _limits
from rootnoise._check import RootnoiseError
from rootnoise.factorization import factorize
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.participation.samplers import FixedCycleSampler
from rootnoise.runs.config import make_mechanism, make_sampler
from rootnoise.runs.data import load
from rootnoise.runs.micro_batches import (
    BLOCKS,
    FIXED,
    PART,
    TIMES,
    StepMemory,
    free_memory,
)
from rootnoise.runs.models import build
from rootnoise.runs.run import run
from rootnoise.runs.trainer import EnvironmentChangedWarning, Trainer
from rootnoise.training import PrivateOptimizer, privatize
from rootnoise.workload import SGD
from test_runs import SMALL, stopped, weights, with_


@pytest.mark.parametrize("mechanism", ["bsr", "dpsgd", "none"])
def test_micro_batches_are_the_run_of_whole_ones(tmp_path, mechanism):
    epsilon = None if mechanism == "none" else 4.0
    seed = None if mechanism == "none" else 5
    config = with_(mechanism=mechanism, epsilon=epsilon, insecure_noise_seed=seed)
    run(config, tmp_path / "whole")
    split = dataclasses.replace(config, micro_batch_size=37)
    if mechanism == "bsr":  # stopped, and gone on with
        stopped(tmp_path / "split", split)
    run(split, tmp_path / "split", resume=mechanism == "bsr")
    whole, found = weights(tmp_path / "whole"), weights(tmp_path / "split")
    for name in whole:
        torch.testing.assert_close(found[name], whole[name], rtol=0, atol=1e-4)


def test_micro_batches_need_less_memory(monkeypatch):
    monkeypatch.setattr(_limits, "_free", lambda: 5e6)
    sampler = make_sampler(SMALL, 1442)
    mechanism = make_mechanism(SMALL, sampler)
    assert mechanism is not None
    data = load("digits")
    with pytest.raises(RootnoiseError, match=r"fewer bands or a smaller batch or micro_batch_size"):
        Trainer(
            dataclasses.replace(SMALL, batch_size=721, micro_batch_size=721),
            data,
            sampler,
            mechanism,
        )
    Trainer(
        dataclasses.replace(SMALL, batch_size=721, micro_batch_size=8), data, sampler, mechanism
    )


def test_memory_that_is_not_known_is_no_limit(monkeypatch):
    for known, free in ((None, math.inf), (5, 5.0)):
        monkeypatch.setattr(_limits, "_free", lambda known=known: known)
        assert free_memory(torch.device("cpu")) == free


def steps_of(trainer, n):
    for _ in range(n):
        trainer._step()
    return trainer.model.state_dict()


def test_micro_batches_are_chosen_from_free_memory(monkeypatch):
    """The choice reads no data; a resumed run keeps it; noise is the same whatever it is."""
    sampler = make_sampler(SMALL, 1442)
    mechanism, data, key = make_mechanism(SMALL, sampler), load("digits"), Key.from_seed(5)
    free = 1e12
    monkeypatch.setattr(_limits, "_free", lambda: free)

    def fresh(data=data):
        return Trainer(SMALL, data, sampler, mechanism, key)

    whole = fresh()
    assert whole._micro == 1442
    held = 12.0 * mechanism.noising.state_size * sum(p.numel() for p in whole.model.parameters())
    plain, example = build("logistic", data.input_shape, 10, 0), data.train_inputs[0]
    memory = StepMemory.of(plain, example)
    free = held + memory.bytes(40) / PART
    said = f"^batches of {SMALL.batch_size} are made in micro-batches of 32, which fit"
    with pytest.warns(UserWarning, match=said):
        split = fresh()
    seen = []
    plain.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert StepMemory.of(plain, torch.full_like(example, torch.nan)) == memory
    assert not seen[0].any()  # a layer may keep more for some values than for others
    zeros = dataclasses.replace(data, train_inputs=torch.zeros_like(data.train_inputs))
    with pytest.warns(UserWarning, match=said):
        other = fresh(zeros)
    assert other._micro == split._micro == 32
    before, after = steps_of(whole, 2), steps_of(split, 2)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-5)
    free = 1e12  # resumed where there is more memory: the same bits as without the stop
    again = fresh()
    again.load_state_dict(copy.deepcopy(split.state_dict()))
    assert again._micro == 32
    after, found = steps_of(split, 1), steps_of(again, 1)
    assert all(torch.equal(found[name], after[name]) for name in after)
    free = held + memory.bytes(20) / PART  # where there is less, a warning says that bits change
    with pytest.warns(UserWarning, match="micro-batches of 16"):
        less = fresh()
    with pytest.warns(EnvironmentChangedWarning, match="micro-batches of 16, its checkpoint .* 32"):
        less.load_state_dict(split.state_dict())


def test_what_is_measured_is_what_passes_leave():
    """Forward keeps both inputs, tanh's output and, for the square, the outputs; backward both
    layers' inputs and output gradients, or the gradients of a bias alone."""
    model = nn.Sequential(nn.Linear(100, 30), nn.Tanh(), nn.Linear(30, 10))
    size = 4 * sum(p.numel() for p in model.parameters())
    expected = StepMemory(FIXED * size + BLOCKS, TIMES * 4 * ((100 + 30 + 10) + (130 + 40)))
    assert StepMemory.of(model, torch.zeros(100)) == expected
    assert expected.bytes(3) == expected.fixed + 3 * expected.each
    assert all(p.grad is None for p in model.parameters())
    model(torch.zeros(2, 100)).sum().backward()  # it is still a plain one
    assert all(p.grad is not None for p in model.parameters())


class Shift(nn.Module):
    """A layer that is run again for each example, of which clipping warns."""

    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return x + self.by


def test_measuring_warns_of_nothing_and_takes_examples_of_any_type():
    """Training warns, once."""
    with pytest.warns(UserWarning, match="Shift"):
        privatize(Shift(), "sum")
    with warnings.catch_warnings(action="error"):
        assert StepMemory.of(Shift(), torch.zeros(4)).each > 0
    words = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 2))
    assert StepMemory.of(words, torch.zeros(3, dtype=torch.int64)).each > 0


def test_a_power_of_two_fits_or_all():
    memory = StepMemory(fixed=100, each=10)
    assert memory.fitting(2 * (100 + 10 * 33), 1000) == 32
    assert memory.fitting(2 * (100 + 10 * 31.9), 1000) == 16
    assert memory.fitting(2 * (100 + 10 * 33), 33) == 33
    assert memory.fitting(-1e9, 1000) == memory.fitting(0, 1000) == 1
    assert memory.fitting(math.inf, 1000) == 1000


def most_held(call):
    """Return the bytes of all tensors at once that a call makes, at most, as torch counts them."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        call()
    events = (e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(itertools.accumulate(events))


def test_the_bytes_of_a_call_are_counted():
    def call():
        x = torch.zeros(1000)
        y = x + 1
        del x
        return y + 1

    assert 8000 <= most_held(call) <= 8200
    assert 4000 <= most_held(lambda: torch.zeros(1000)) <= 4200


@pytest.mark.parametrize(
    ("name", "shape", "micro"),
    [
        ("logistic", (64,), 64),
        ("logistic", (3, 32, 32), 1),
        ("logistic", (3, 32, 32), 64),
        ("mlp", (1, 28, 28), 64),
        ("mlp", (3, 32, 32), 64),
        ("cnn", (1, 8, 8), 64),
        ("cnn", (3, 32, 32), 1),
        ("cnn", (3, 32, 32), 64),
        ("transformer", (64,), 64),
        ("transformer", (1, 28, 28), 64),
        ("resnet18", (1, 8, 8), 1),
        ("resnet18", (3, 32, 32), 4),
    ],
)
def test_no_step_takes_more_than_is_estimated(name, shape, micro):
    """With a probe, in parts; and the estimate of many examples is not far above it."""
    model = build(name, shape, 10, 0)
    memory = StepMemory.of(model, torch.zeros(shape))
    sampler = FixedCycleSampler(4 * micro, 2 * micro, epochs=2, seed=0)
    split = factorize(SGD(4, momentum=0.9), sampler.participation, "bsr", bands=2)
    mechanism = Mechanism.calibrate(split, sampler.participation, noise_multiplier=1.0, delta=1e-5)
    module = privatize(model, "sum")
    sgd = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    optimizer = PrivateOptimizer(sgd, module, mechanism, sampler, planned=True)
    x = torch.randn(4 * micro, *shape, generator=torch.Generator().manual_seed(1))
    y = torch.arange(4 * micro) % 10

    def step():
        optimizer.zero_grad()
        first, last = np.split(sampler.batch(optimizer.t), 2)
        for part in (first, last):
            cross_entropy(module(x[part]), y[part], reduction="sum").backward()
            (optimizer.accumulate if part is first else optimizer.step)(part)

    held = [most_held(step) for _ in range(2)]
    assert optimizer._probe.probed == ([0, 1] if micro > 1 else [])
    assert max(held) <= memory.bytes(micro)
    assert memory.bytes(micro) - BLOCKS <= 3 * max(held)
