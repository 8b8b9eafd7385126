"""The side of rootnoise, and torch's own normals and plain steps beside it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import TensorDataset

import rootnoise
from rootnoise import SGD, FixedCycle, Mechanism, NoiseStream, SingleParticipation, factorize
from rootnoise.cli.bench import models
from rootnoise.cli.bench.clock import growth, measured, paired, seconds, serve, timed

STEPS = 4096  # that the noise of a timed step is planned for


def versions() -> dict[str, Any]:
    """Return what is measured, and on what."""
    return {
        "rootnoise": rootnoise.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def factors(mechanism: str, n: int, k: int, bands: int | None, momentum: float) -> dict[str, Any]:
    """Return C and the time to make it, the first time and again."""
    who = FixedCycle(n // k, k)

    def make() -> rootnoise.Factorization:
        return factorize(SGD(n, momentum=momentum), who, mechanism, bands=bands)

    first, strategy = timed(lambda: make().strategy)
    c = strategy.coefficients
    return {
        "first": first,
        "again": timed(make)[0],
        "strategy": (strategy.dense() if c is None else c[: bands or n]).tolist(),
    }


def plan_time(n: int, k: int, bands: int) -> dict[str, Any]:
    """Return the time of BSR's coefficients, sensitivity and error."""
    who = FixedCycle(n // k, k)
    return {"seconds": seconds(lambda: factorize(SGD(n), who, "bsr", bands=bands).rmse(who))}


@cache
def _stream(d: int, bands: int) -> NoiseStream:
    who = SingleParticipation()
    split = factorize(SGD(10_000), who, "bsr", bands=bands)
    made = Mechanism.calibrate(split, who, noise_multiplier=1.0, delta=1e-5)
    stream = NoiseStream(made, d)
    for _ in range(stream.block_steps):
        stream.next()
    return stream


def noise(d: int, bands: int) -> dict[str, Any]:
    """Return the time of one step's noise, the mean over whole blocks, and of `torch.randn`."""
    stream = _stream(d, bands)
    found = paired(lambda: torch.randn(d), stream.next, steps=stream.block_steps, budget=1.0)
    return {**found, "rows": stream.memory_rows}


def _private_step(model: str, n: int) -> tuple[Callable[[], None], int]:
    from rootnoise import FixedCycleSampler, PrivateOptimizer, privatize

    net, x, y = models.batch(model, n)
    sampler = FixedCycleSampler(8 * n, n, epochs=STEPS // 8, seed=0)
    who = sampler.participation
    split = factorize(SGD(sampler.n_steps), who, "bsr", bands=8)
    mechanism = Mechanism.calibrate(split, who, noise_multiplier=1.0, delta=1e-6)
    private = privatize(net)
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3)
    # A probe repeats steps 0, 1, 2, 4, 8 and so on: a cost of a run, not of a step.
    optimizer = PrivateOptimizer(sgd, private, mechanism, sampler, independence="assumed")

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(private(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step(torch.from_numpy(sampler.batch(optimizer.t)))

    return step, optimizer.stream.block_steps


@cache
def _pair(model: str, n: int) -> tuple[Callable[[], None], Callable[[], None], int]:
    step, block = _private_step(model, n)
    for _ in range(block):
        step()
    return models.plain_step(model, n), step, block


def step(model: str, n: int) -> dict[str, Any]:
    """Return the time of a private step, over whole blocks of noise, and of a plain one."""
    return paired(*_pair(model, n))


def memory(model: str, n: int) -> dict[str, Any]:
    """Return the peak memory of private steps."""
    return {"MB": growth(lambda: _private_step(model, n)[0])}


def plain_memory(model: str, n: int) -> dict[str, Any]:
    """Return the peak memory of plain steps."""
    return {"MB": growth(lambda: models.plain_step(model, n))}


def _who(groups: int, q: float) -> rootnoise.CyclicPoisson:
    return rootnoise.CyclicPoisson(groups, q)


def epsilon(sigma: float, q: float, n: int, delta: float, groups: int) -> dict[str, Any]:
    """Return the epsilon of a run and the time to account for it."""

    def cost() -> float:
        return rootnoise.privacy_cost(_who(groups, q), n, sigma, delta).epsilon

    return measured(cost)


def calibrate(target: float, q: float, n: int, delta: float, groups: int) -> dict[str, Any]:
    """Return the noise multiplier of an epsilon and the time to find it."""

    def find() -> float:
        return rootnoise.noise_multiplier(_who(groups, q), n, target, delta)

    return measured(find)


def draw(n_examples: int) -> dict[str, Any]:
    """Return the time to draw one Poisson batch of 64 expected examples."""
    from rootnoise import CyclicPoissonSampler

    sampler = CyclicPoissonSampler(n_examples, 64, n_steps=10**6, groups=1, seed=0)
    steps = iter(range(10**6))
    return {"seconds": seconds(lambda: sampler.batch(next(steps)))}


def accuracy(
    data: str, target: float, delta: float, epochs: int, n: int, lr: float, seed: int, noise: str
) -> dict[str, Any]:
    """Return the test accuracy of one private run by `make_private`."""
    x, y, *test = models.held(data)
    net = models.small(x.shape[1], seed)
    sgd = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    asked: dict[str, Any] = {}
    if noise == "independent":
        asked = {"mechanism": "identity", "sampling": "poisson"}
    private, optimizer, loader = rootnoise.make_private(
        net,
        sgd,
        TensorDataset(x, y),
        batch_size=n,
        epsilon=target,
        delta=delta,
        epochs=epochs,
        **asked,
    )
    right = models.trained(private, optimizer, loader, epochs, (test[0], test[1]))
    return {"value": right, "epsilon": optimizer.epsilon_spent()}


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "versions": versions,
    "factors": factors,
    "plan_time": plan_time,
    "noise": noise,
    "step": step,
    "memory": memory,
    "plain_memory": plain_memory,
    "epsilon": epsilon,
    "calibrate": calibrate,
    "draw": draw,
    "accuracy": accuracy,
}

if __name__ == "__main__":
    serve(MEASURES)
