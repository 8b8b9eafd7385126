"""The side of Opacus: its hooks and its ghost clipping, with its independent noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from rootnoise.cli.bench import models
from rootnoise.cli.bench.clock import growth, measured, paired, quickest, seconds, serve


def versions() -> dict[str, Any]:
    """Return what is measured."""
    return {"opacus": version("opacus"), "torch": torch.__version__}


def noise(d: int, bands: int) -> dict[str, Any]:
    """Return the time of its noise, which is independent: one band."""
    from opacus.optimizers.optimizer import _generate_noise

    if bands > 1:
        return {"missing": True}
    like = torch.zeros(d)
    return paired(lambda: torch.randn(d), lambda: _generate_noise(1.0, like), 4, budget=1.0)


def private_step(
    way: str,
    model: nn.Module,
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
    n: int,
    loss: Callable[..., torch.Tensor] = functional.cross_entropy,
) -> Callable[[], None]:
    """Return what makes one step of Opacus's on a batch of n examples, in micro-batches.

    Args:
        way: "hooks", "functorch" or "ghost".
        model: as it is without privacy.
        parts: inputs and labels of each micro-batch.
        n: examples of the batch.
        loss: mean cross-entropy of scores and labels; ghost clipping takes torch's own.
    """
    from opacus import GradSampleModule
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
        GradSampleModuleFastGradientClipping,
    )
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
    options: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}
    options["expected_batch_size"] = n
    wrapped: nn.Module
    criterion: Any
    if way == "ghost":
        wrapped = GradSampleModuleFastGradientClipping(
            model, max_grad_norm=1.0, use_ghost_clipping=True
        )
        optimizer = DPOptimizerFastGradientClipping(sgd, **options)
        criterion = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss())
    else:
        wrapped = GradSampleModule(model, force_functorch=way == "functorch", strict=False)
        optimizer, criterion = DPOptimizer(sgd, **options), loss

    def step() -> None:
        for i, (x, y) in enumerate(parts):
            optimizer.zero_grad()
            optimizer.signal_skip_step(i < len(parts) - 1)
            criterion(wrapped(x), y).backward()
            optimizer.step()

    return step


def _step_of(model: str, n: int, ghost: bool, micro: int | None) -> Callable[[], None]:
    net, x, y = models.batch(model, n)
    parts = list(zip(torch.split(x, micro or n), torch.split(y, micro or n), strict=True))
    return private_step("ghost" if ghost else "hooks", net, parts, n)


@cache
def _pair(model: str, n: int, ghost: bool) -> tuple[Callable[[], None], Callable[[], object], str]:
    # Ghost clipping is quickest all at once (docs/clipping.md).
    sizes = (None,) if ghost else (None, 8, 1)
    ways = {str(m or "all"): partial(_step_of, model, n, ghost, m) for m in sizes}
    micro, step = quickest(ways)
    return models.plain_step(model, n), step, micro


def _step(model: str, n: int, ghost: bool) -> dict[str, Any]:
    plain, private, micro = _pair(model, n, ghost)
    return {**paired(plain, private, steps=2), "micro": micro}


def step(model: str, n: int) -> dict[str, Any]:
    """Return the time of a step with hooks and of a plain one."""
    return _step(model, n, ghost=False)


def ghost(model: str, n: int) -> dict[str, Any]:
    """Return the time of a step with ghost clipping and of a plain one."""
    return _step(model, n, ghost=True)


def memory(model: str, n: int) -> dict[str, Any]:
    """Return the peak memory of steps with hooks, in micro-batches of 8."""
    return {"MB": growth(lambda: _step_of(model, n, False, 8))}


def ghost_memory(model: str, n: int) -> dict[str, Any]:
    """Return the peak memory of steps with ghost clipping."""
    return {"MB": growth(lambda: _step_of(model, n, True, None))}


def epsilon(sigma: float, q: float, n: int, delta: float, groups: int) -> dict[str, Any]:
    """Return the epsilon of its PRV accountant, its default."""
    from opacus.accountants import PRVAccountant

    if groups > 1:
        return {"missing": True}

    def cost() -> float:
        accountant = PRVAccountant()
        accountant.history = [(sigma, q, n)]
        return float(accountant.get_epsilon(delta))

    return measured(cost)


def calibrate(target: float, q: float, n: int, delta: float, groups: int) -> dict[str, Any]:
    """Return the noise multiplier that it finds by its PRV accountant."""
    from opacus.accountants.utils import get_noise_multiplier

    if groups > 1:
        return {"missing": True}

    def find() -> float:
        found: float = get_noise_multiplier(
            target_epsilon=target, target_delta=delta, sample_rate=q, steps=n, accountant="prv"
        )
        return found

    return measured(find)


def draw(n_examples: int) -> dict[str, Any]:
    """Return the time to draw one Poisson batch of 64 expected examples."""
    from opacus.utils.uniform_sampler import UniformWithReplacementSampler

    sampler = UniformWithReplacementSampler(
        num_samples=n_examples, sample_rate=64 / n_examples, steps=10**6
    )
    batches = iter(sampler)
    return {"seconds": seconds(lambda: next(batches))}


def accuracy(
    data: str, target: float, delta: float, epochs: int, n: int, lr: float, seed: int, noise: str
) -> dict[str, Any]:
    """Return the test accuracy of one private run by its `PrivacyEngine`, with Poisson batches."""
    from opacus import PrivacyEngine

    if noise != "default":
        return {"missing": True}  # it has this one alone
    x, y, *test = models.held(data)
    net = models.small(x.shape[1], seed)
    sgd = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    engine = PrivacyEngine()
    private, optimizer, loader = engine.make_private_with_epsilon(
        module=net,
        optimizer=sgd,
        data_loader=DataLoader(TensorDataset(x, y), batch_size=n),
        target_epsilon=target,
        target_delta=delta,
        epochs=epochs,
        max_grad_norm=1.0,
    )
    right = models.trained(private, optimizer, loader, epochs, (test[0], test[1]))
    return {"value": right, "epsilon": float(engine.get_epsilon(delta))}


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "versions": versions,
    "noise": noise,
    "step": step,
    "ghost": ghost,
    "memory": memory,
    "ghost_memory": ghost_memory,
    "epsilon": epsilon,
    "calibrate": calibrate,
    "draw": draw,
    "accuracy": accuracy,
}

if __name__ == "__main__":
    serve(MEASURES)
