"""The side of JAX-Privacy, run in .venv-rivals-jax by benchmarks/comparison/run.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clock import (
    growth,
    measured,
    paired,
    seconds,
    serve,
    timed,
)  # of rootnoise.cli.bench, through PYTHONPATH
from jax_privacy import accounting, batch_selection, clipping, noise_addition
from jax_privacy.accounting import calibrate as calibration
from jax_privacy.matrix_factorization import banded, buffered_toeplitz, dense, toeplitz


def versions() -> dict[str, Any]:
    """Return what is measured."""
    return {"jax-privacy": version("jax-privacy"), "jax": jax.__version__}


def _made(mechanism: str, n: int, k: int, bands: int | None) -> Any:
    if mechanism == "bsr":
        return toeplitz.optimal_max_error_strategy_coefs(n)[:bands]
    if mechanism == "banded":
        return toeplitz.optimize_banded_toeplitz(n, bands)
    if mechanism == "blt":
        made = buffered_toeplitz.optimize(n=n, min_sep=n // k, max_participations=k, error="mean")
        return made.toeplitz_coefs(n)
    if mechanism == "bandmf":
        return banded.optimize(n, bands=bands).materialize()
    return dense.optimize(n, epochs=k)


def factors(mechanism: str, n: int, k: int, bands: int | None, momentum: float) -> dict[str, Any]:
    """Return C in float64 and the time to make it, compilation in the first."""
    if momentum:
        return {"missing": True}  # its optimisers are for prefix sums, unless one writes a loss
    with jax.enable_x64(True):
        first, strategy = timed(lambda: np.asarray(_made(mechanism, n, k, bands), dtype=float))
        again, _ = timed(lambda: np.asarray(_made(mechanism, n, k, bands)))
    return {"first": first, "again": again, "strategy": strategy.tolist()}


def plan_time(n: int, k: int, bands: int) -> dict[str, Any]:
    """Return the time of BSR's coefficients, sensitivity and error, compiled before."""
    if n > 10**5:
        return {"missing": True}

    def make() -> float:
        c = toeplitz.optimal_max_error_strategy_coefs(n)[:bands]
        sensitivity = toeplitz.minsep_sensitivity_squared(c, n // k, k, n)
        return float(sensitivity * toeplitz.per_query_error(strategy_coef=c, n=n).mean())

    with jax.enable_x64(True):
        make()
        return {"seconds": seconds(make)}


@cache
def _stream(d: int, bands: int) -> Callable[[], None]:
    c = jnp.asarray(toeplitz.optimal_max_error_strategy_coefs(bands), dtype=jnp.float32)
    matrix = toeplitz.inverse_as_streaming_matrix(c)
    privatizer = noise_addition.matrix_factorization_privatizer(matrix, stddev=1.0, prng_key=0)
    zero = jnp.zeros(d)
    state, update = privatizer.init(zero), jax.jit(privatizer.update, donate_argnums=1)

    def step() -> None:
        nonlocal state
        noise, state = update(zero, state)
        noise.block_until_ready()

    step()
    step()
    return step


def noise(d: int, bands: int) -> dict[str, Any]:
    """Return the time of one step's noise, compiled before."""
    return {"seconds": seconds(_stream(d, bands))}


def _pair(model: str, n: int) -> tuple[Callable[[], None], Callable[[], None]]:
    sizes = (784, 1000, 200, 10)
    keys = jax.random.split(jax.random.key(0), 3)
    start = [
        (jax.random.normal(key, (a, b)) / a**0.5, jnp.zeros(b))
        for key, (a, b) in zip(keys, pairwise(sizes), strict=True)
    ]
    x = jax.random.normal(jax.random.key(1), (n, 784))
    y = jax.random.randint(jax.random.key(2), (n,), 0, 10)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        for w, b in params[:-1]:
            x = jax.nn.relu(x @ w + b)
        scores = x @ params[-1][0] + params[-1][1]
        return -jnp.take_along_axis(jax.nn.log_softmax(scores), y[:, None], 1).mean()

    clipped = clipping.clipped_grad(
        loss, l2_clip_norm=1.0, batch_argnums=(1, 2), normalize_by=float(n)
    )
    matrix = toeplitz.inverse_as_streaming_matrix(
        jnp.asarray(toeplitz.optimal_max_error_strategy_coefs(8), dtype=jnp.float32)
    )
    privatizer = noise_addition.matrix_factorization_privatizer(matrix, stddev=1.0 / n, prng_key=0)

    def moved(params: Any, gradients: Any) -> Any:
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradients)

    @jax.jit
    def private(params: Any, state: Any) -> Any:
        noised, state = privatizer.update(clipped(params, x, y), state)
        return moved(params, noised), state

    open_step = jax.jit(lambda params: moved(params, jax.grad(loss)(params, x, y)))
    held: dict[str, Any] = {"private": (start, privatizer.init(start)), "open": start}

    def step() -> None:
        held["private"] = jax.block_until_ready(private(*held["private"]))

    def plain() -> None:
        held["open"] = jax.block_until_ready(open_step(held["open"]))

    return plain, step


@cache
def _warm(model: str, n: int) -> tuple[Callable[[], None], Callable[[], None]]:
    plain, step = _pair(model, n)
    plain(), step(), step()
    return plain, step


def step(model: str, n: int) -> dict[str, Any]:
    """Return the time of a private step, and of JAX's own plain one."""
    if model != "perceptron":
        return {"missing": True}  # models are its users' own functions; one is written here
    return paired(*_warm(model, n), steps=2)


def memory(model: str, n: int) -> dict[str, Any]:
    """Return the peak memory of private steps, compilation included."""
    if model != "perceptron":
        return {"missing": True}
    return {"MB": growth(lambda: _pair(model, n)[1])}


def plain_memory(model: str, n: int) -> dict[str, Any]:
    """Return the peak memory of JAX's own plain steps, compilation included."""
    if model != "perceptron":
        return {"missing": True}
    return {"MB": growth(lambda: _pair(model, n)[0])}


def _accountant() -> Any:
    return accounting.analysis.DpsgdTrainingAccountant(
        dp_accountant_config=accounting.accountants.PldAccountantConfig()
    )


def epsilon(sigma: float, q: float, n: int, delta: float, groups: int) -> dict[str, Any]:
    """Return the epsilon of its PLD accountant with its default grid."""
    size = 160_000

    def cost() -> float:
        params = accounting.analysis.DpParams(
            noise_multipliers=sigma,
            num_samples=size,
            delta=delta,
            batch_size=round(q * (size // groups)),
            cycle_length=groups,
        )
        return float(_accountant().compute_epsilon(n, params))

    return measured(cost)


def calibrate(target: float, q: float, n: int, delta: float, groups: int) -> dict[str, Any]:
    """Return the noise multiplier that it finds with its default tolerance."""
    size = 160_000

    def find() -> float:
        return calibration.calibrate_noise_multiplier(
            target_epsilon=target,
            accountant=_accountant(),
            batch_sizes=round(q * (size // groups)),
            num_updates=n,
            num_samples=size,
            target_delta=delta,
            cycle_length=groups,
        )

    return measured(find)


def draw(n_examples: int) -> dict[str, Any]:
    """Return the time to draw one Poisson batch of 64 expected examples."""
    strategy = batch_selection.CyclicPoissonSampling(64 / n_examples, 10**6)
    batches = strategy.batch_iterator(n_examples, 0)
    next(batches)
    return {"seconds": seconds(lambda: next(batches))}


MEASURES = {
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
}

if __name__ == "__main__":
    serve(MEASURES)
