"""Small models, examples and private optimizers, and a slow twin of the clipped sum."""

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from rootnoise.factorization import factorize
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.participation.samplers import FixedCycleSampler
from rootnoise.training import PrivateOptimizer, privatize
from rootnoise.workload import SGD

N, BATCH, EPOCHS, CLASSES = 24, 4, 3, 5
KEY = Key.from_seed(1)


def linear(size=7):
    return initialised(nn.Linear(size, CLASSES))


def convolution():
    return initialised(
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES))
    )


def initialised(model):
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5, generator=generator)
    return model


def examples(*shape):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(N, *shape, generator=generator)
    return x, torch.randint(0, CLASSES, (N,), generator=generator)


def calibrated(sampler, momentum=0.9, decay=1.0, clip_norm=1.0, bands=None, sigma=0.3):
    workload = SGD(sampler.n_steps, momentum, decay)
    factorization = factorize(workload, sampler.participation, "bsr", bands=bands)
    return Mechanism.calibrate(
        factorization,
        sampler.participation,
        noise_multiplier=sigma,
        delta=1e-5,
        clip_norm=clip_norm,
    )


def make(model=None, *, reduction="mean", key=KEY, decay=1.0, **options):
    """Return a private optimizer over `model` and a fixed cycle of N examples."""
    sampler = FixedCycleSampler(N, BATCH, EPOCHS, seed=0)
    module = privatize(linear() if model is None else model, reduction)
    sgd = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    mechanism = calibrated(sampler, decay=decay, **options)
    return PrivateOptimizer(sgd, module, mechanism, sampler, key, decay=decay)


def backward(optimizer, x, y, batch):
    optimizer.zero_grad()
    reduction = optimizer.module.loss_reduction
    cross_entropy(optimizer.module(x[batch]), y[batch], reduction=reduction).backward()


def train(optimizer, x, y, until=None):
    for t in range(optimizer.t, optimizer.sampler.n_steps if until is None else until):
        batch = optimizer.sampler.batch(t)
        backward(optimizer, x, y, batch)
        optimizer.step(batch)


def flat(optimizer, attribute):
    parts = [getattr(p, attribute).flatten() for p in optimizer.module.parameters()]
    return torch.cat(parts).double().numpy()


def slow_sum(optimizer, x, y, batch):
    """The clipped sum, one example at a time, by plain autograd in float64."""
    total = np.zeros(sum(p.numel() for p in optimizer.module.parameters()))
    parameters = list(optimizer.module._module.parameters())
    for i in batch:
        with optimizer.module.paused():
            loss = cross_entropy(optimizer.module._module(x[i : i + 1]), y[i : i + 1])
            parts = torch.autograd.grad(loss, parameters)
        g = torch.cat([part.flatten() for part in parts]).double().numpy()
        total += g * min(1, optimizer.mechanism.clip_norm / np.linalg.norm(g))
    return total
