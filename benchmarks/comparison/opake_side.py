"""The side of opake, run in .venv-rivals-opake by benchmarks/comparison/run.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import models
import torch
from clock import (
    growth,
    measured,
    paired,
    quickest,
    seconds,
    serve,
    timed,
)  # of rootnoise.cli.bench, through PYTHONPATH
from torch.nn import functional

# opake-accounting 0.16.1 does not import on CPython 3.11.7, whose dataclasses overlook an inherited
# __weakref__. This is what later ones do.
_older = dataclasses._get_slots


def _get_slots(cls: type) -> Iterator[str]:
    if cls.__dict__.get("__slots__") is not None:
        yield from _older(cls)
    elif getattr(cls, "__weakrefoffset__", -1) != 0:
        yield "__weakref__"


dataclasses._get_slots = _get_slots

import opake.accounting  # noqa: E402
import opake.dpftrl.accounting  # noqa: E402
import opake.dpsgd.accounting  # noqa: E402
from opake import dpftrl  # noqa: E402
from opake.api.dpftrl.noise import _band_mf, _blt, _bsr, _toeplitz  # noqa: E402
from opake.dpsgd import PoissonSampler  # noqa: E402
from opake.random import key  # noqa: E402
from opake.types import ClippedPytree  # noqa: E402


def versions() -> dict[str, Any]:
    """Return what is measured."""
    return {"opake": version("opake-dpftrl"), "torch": torch.__version__}


def _forget() -> None:
    for module in (_band_mf, _blt, _bsr):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def factors(mechanism: str, n: int, k: int, bands: int | None, momentum: float) -> dict[str, Any]:
    """Return C and the time to make it, its caches emptied."""
    if mechanism == "bsr":
        recipe = dpftrl.bsr_strategy(bandwidth=bands, alpha=1.0, beta=momentum)
    elif momentum:
        return {"missing": True}  # its momentum weights gradients otherwise than SGD does
    elif mechanism == "banded":
        recipe = dpftrl.band_mf_strategy(bands=bands)
    elif mechanism == "blt":
        recipe = dpftrl.blt_strategy()
    else:
        return {"missing": True}

    def make() -> torch.Tensor:
        _forget()
        return recipe.coefficients(n_steps=n, min_sep=n // k, max_participations=k)

    first, strategy = timed(make)
    again, _ = timed(make)
    return {"first": first, "again": again, "strategy": strategy.tolist()[: bands or n]}


def plan_time(n: int, k: int, bands: int) -> dict[str, Any]:
    """Return the time of BSR's coefficients, sensitivity and error."""
    if n > 10**5:
        return {"missing": True}
    recipe = dpftrl.bsr_strategy(bandwidth=bands, alpha=1.0, beta=0.0)

    def make() -> float:
        _forget()
        c = recipe.coefficients(n_steps=n)
        sensitivity = recipe.sensitivity(n_steps=n, min_sep=n // k, max_participations=k)
        return sensitivity**2 * float(_toeplitz.mean_error(strategy_coef=c[:bands], n=n))

    return {"seconds": seconds(make)}


def _noise(like: Any, bands: int) -> tuple[Callable[..., Any], Any]:
    recipe = dpftrl.bsr_strategy(bandwidth=bands, alpha=1.0, beta=0.0)
    return dpftrl.mf_gaussian_noise(
        like,
        recipe,
        n_steps=4096,
        min_sep=4096,
        max_participations=1,
        noise_multiplier=1.0,
        key=key(0),
    )


@cache
def _stream(d: int, bands: int) -> Callable[[], None]:
    zero = {"w": torch.zeros(d)}
    add, state = _noise(zero, bands)
    clipped = ClippedPytree(pytree=zero, max_norm=1.0)

    def step() -> None:
        nonlocal state
        _, state = add(clipped, state)

    step()
    step()
    return step


def noise(d: int, bands: int) -> dict[str, Any]:
    """Return the time of one step's noise."""
    return paired(lambda: torch.randn(d), _stream(d, bands), steps=4, budget=1.0)


def _private_step(model: str, n: int, micro: int | None) -> Callable[[], None]:
    net, x, y = models.batch(model, n)
    params = {name: p.detach().clone() for name, p in net.named_parameters()}

    def loss(params: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        scores = torch.func.functional_call(net, params, (x[None],))
        return functional.cross_entropy(scores, y[None])

    clip, clipping = dpftrl.clipped_grad(
        loss, clipping_norm=1.0, normalize_by=float(n), batch_argnums=(1, 2), microbatch_size=micro
    )
    add, state = _noise(params, 8)

    def step() -> None:
        nonlocal clipping, state
        clipped, clipping = clip(params, x, y, state=clipping)
        noised, state = add(clipped, state)
        for name, p in params.items():
            p.sub_(noised.pytree[name], alpha=1e-3)

    return step


@cache
def _pair(model: str, n: int) -> tuple[Callable[[], None], Callable[[], object], str]:
    ways = {str(m or "all"): partial(_private_step, model, n, m) for m in (None, 8, 1)}
    micro, step = quickest(ways)
    return models.plain_step(model, n), step, micro


def step(model: str, n: int) -> dict[str, Any]:
    """Return the time of a private step and of a plain one."""
    plain, private, micro = _pair(model, n)
    return {**paired(plain, private, steps=2), "micro": micro}


def memory(model: str, n: int) -> dict[str, Any]:
    """Return the peak memory of private steps in micro-batches of 8."""
    return {"MB": growth(lambda: _private_step(model, n, 8))}


def _run(sigma: float, q: float, n: int, groups: int) -> Any:
    if groups == 1:
        account = opake.dpsgd.accounting
        return account.poisson(account.gaussian(sigma), sample_rate=q) * n
    account = opake.dpftrl.accounting
    recipe = dpftrl.band_mf_strategy(bands=groups)
    return account.poisson(account.mf_gaussian(sigma, recipe), sample_rate=q, n_steps=n)


def epsilon(sigma: float, q: float, n: int, delta: float, groups: int) -> dict[str, Any]:
    """Return the epsilon of its accountant."""
    if groups > 1:
        dpftrl.band_mf_strategy(bands=groups).coefficients(n_steps=n)  # optimised before
    return measured(lambda: _run(sigma, q, n, groups).epsilon_at(delta))


def calibrate(target: float, q: float, n: int, delta: float, groups: int) -> dict[str, Any]:
    """Return the noise multiplier that it finds."""
    budget = opake.accounting.epsilon_budget(target, delta=delta)

    def find() -> float:
        found = opake.accounting.calibrate(
            budget, lambda sigma: _run(sigma, q, n, groups), param_min=0.3, param_max=20.0
        )
        return float(found.param)

    return measured(find)


def draw(n_examples: int) -> dict[str, Any]:
    """Return the time to draw one Poisson batch of 64 expected examples."""
    sampler = PoissonSampler(range(n_examples), 64 / n_examples, key=key(0))
    batches = iter(sampler)
    next(batches)
    return {"seconds": seconds(lambda: next(batches))}


MEASURES = {
    "versions": versions,
    "factors": factors,
    "plan_time": plan_time,
    "noise": noise,
    "step": step,
    "memory": memory,
    "epsilon": epsilon,
    "calibrate": calibrate,
    "draw": draw,
}

if __name__ == "__main__":
    serve(MEASURES)
