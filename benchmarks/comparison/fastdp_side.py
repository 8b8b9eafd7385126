"""The side of fastDP, run in .venv-rivals-fastdp by benchmarks/comparison/run.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import fastDP
import models
import torch
from clock import growth, measured, paired, serve  # of rootnoise.cli.bench, through PYTHONPATH
from fastDP.accounting.accounting_manager import DEFAULT_ALPHAS, RDPManager
from torch.nn import functional


def versions() -> dict[str, Any]:
    """Return what is measured."""
    return {"fastDP": fastDP.__version__, "torch": torch.__version__}


def _private_step(model: str, n: int) -> Callable[[], None]:
    net, x, y = models.batch(model, n)
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3)
    engine = fastDP.PrivacyEngine(
        net,
        batch_size=n,
        sample_size=8 * n,
        epochs=1,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping_fn="Abadi",
    )
    engine.attach(sgd)

    def step() -> None:
        functional.cross_entropy(net(x), y).backward()
        sgd.step()

    return step


@cache
def _pair(model: str, n: int) -> tuple[Callable[[], None], Callable[[], None]]:
    step = _private_step(model, n)
    step()
    step()
    return models.plain_step(model, n), step


def step(model: str, n: int) -> dict[str, Any]:
    """Return the time of a private step and of a plain one."""
    return paired(*_pair(model, n), steps=2)


def memory(model: str, n: int) -> dict[str, Any]:
    """Return the peak memory of private steps."""
    return {"MB": growth(lambda: _private_step(model, n))}


def epsilon(sigma: float, q: float, n: int, delta: float, groups: int) -> dict[str, Any]:
    """Return the epsilon of its Renyi accountant, its default."""
    if groups > 1:
        return {"missing": True}
    manager = RDPManager(DEFAULT_ALPHAS)

    def cost() -> float:
        return float(manager.compute_epsilon(sigma, q, delta, n)["eps_rdp"])

    return measured(cost)


def calibrate(target: float, q: float, n: int, delta: float, groups: int) -> dict[str, Any]:
    """Return the noise multiplier that it finds."""
    if groups > 1:
        return {"missing": True}
    manager = RDPManager(DEFAULT_ALPHAS)

    def find() -> float:
        return float(manager.compute_sigma(target, delta, q, steps=n))

    return measured(find)


MEASURES = {
    "versions": versions,
    "step": step,
    "memory": memory,
    "epsilon": epsilon,
    "calibrate": calibrate,
}

if __name__ == "__main__":
    serve(MEASURES)
