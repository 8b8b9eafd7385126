"""The side of JAX-Privacy, run in .venv-rivals-jax by benchmarks/comparison/run.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import version
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


def _weights(*shapes: tuple[int, ...]) -> list[tuple[jax.Array, jax.Array]]:
    """Return a matrix or kernel of each shape, inputs last but one, and a bias."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [
        (jax.random.normal(key, shape) / np.prod(shape[:-1]) ** 0.5, jnp.zeros(shape[-1]))
        for key, shape in zip(keys, shapes, strict=True)
    ]


def _layers(params: Any, x: jax.Array) -> jax.Array:
    *hidden, (w, b) = params
    for v, c in hidden:
        x = jax.nn.relu(x @ v + c)
    return x @ w + b


def _cnn(params: Any, x: jax.Array) -> jax.Array:
    for w, b in params[:2]:
        x = jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.lax.reduce_window(
            jax.nn.relu(x + b), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
        )
    return _layers(params[2:], x.reshape(x.shape[0], -1))


def _norm(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + shift


def _transformer(params: Any, ids: jax.Array) -> jax.Array:
    table, blocks, last = params
    x = table[ids]
    n, tokens, width = x.shape
    for (first, out, up, down), norms in blocks:
        heads = (x @ first[0] + first[1]).reshape(n, tokens, 3, 4, width // 4)
        q, k, v = heads.transpose(2, 0, 3, 1, 4)
        share = jax.nn.softmax(q @ k.swapaxes(-1, -2) / (width // 4) ** 0.5)
        seen = (share @ v).swapaxes(1, 2).reshape(n, tokens, width)
        x = _norm(x + seen @ out[0] + out[1], *norms[0])
        x = _norm(x + _layers([up, down], x), *norms[1])
    return x.mean(1) @ last[0][0] + last[0][1]


def _encoder() -> Any:
    shapes = (192, 3 * 192), (192, 192), (192, 512), (512, 192)
    norm = jnp.ones(192), jnp.zeros(192)
    blocks = [(_weights(*shapes), [norm, norm]) for _ in range(2)]
    return jax.random.normal(jax.random.key(0), (1000, 192)), blocks, _weights((192, 10))


# The perceptron takes 0.025 s so, 0.4 s by eights, 17 s all at once; the other two are alike.
MICRO = 1

# Those of models.py, written again.
MODELS: dict[str, tuple[Callable[[], Any], Callable[..., jax.Array], tuple[int, ...]]] = {
    "perceptron": (lambda: _weights((784, 1000), (1000, 200), (200, 10)), _layers, (784,)),
    "cnn": (
        lambda: _weights((3, 3, 1, 32), (3, 3, 32, 64), (3136, 120), (120, 10)),
        _cnn,
        (28, 28, 1),
    ),
    "transformer": (_encoder, _transformer, (64,)),
}


def _loss_and_data(model: str, n: int) -> tuple[Callable[..., jax.Array], Any, Any]:
    make, scores, shape = MODELS[model]
    key = jax.random.key(1)
    if model == "transformer":
        x = jax.random.randint(key, (n, *shape), 0, 1000)
    else:
        x = jax.random.normal(key, (n, *shape))
    y = jax.random.randint(jax.random.key(2), (n,), 0, 10)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        found = jax.nn.log_softmax(scores(params, x))
        return -jnp.take_along_axis(found, y[:, None], 1).mean()

    return loss, make(), (x, y)


def _moved(params: Any, gradients: Any) -> Any:
    return jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradients)


def _plain(model: str, n: int) -> Callable[[], None]:
    loss, params, data = _loss_and_data(model, n)
    made = jax.jit(lambda params, x, y: _moved(params, jax.grad(loss)(params, x, y)))

    def step() -> None:
        nonlocal params
        params = jax.block_until_ready(made(params, *data))

    return step


def _private(model: str, n: int) -> Callable[[], None]:
    loss, params, data = _loss_and_data(model, n)
    clipped = clipping.clipped_grad(
        loss,
        l2_clip_norm=1.0,
        batch_argnums=(1, 2),
        normalize_by=float(n),
        microbatch_size=MICRO,
    )
    matrix = toeplitz.inverse_as_streaming_matrix(
        jnp.asarray(toeplitz.optimal_max_error_strategy_coefs(8), dtype=jnp.float32)
    )
    privatizer = noise_addition.matrix_factorization_privatizer(matrix, stddev=1.0 / n, prng_key=0)

    @jax.jit
    def made(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        noised, state = privatizer.update(clipped(params, x, y), state)
        return _moved(params, noised), state

    state = privatizer.init(params)

    def step() -> None:
        nonlocal params, state
        params, state = jax.block_until_ready(made(params, state, *data))

    return step


@cache
def _pair(model: str, n: int) -> tuple[Callable[[], None], Callable[[], None]]:
    plain, step = _plain(model, n), _private(model, n)
    for call in (plain, step, step):
        call()
    return plain, step


def step(model: str, n: int) -> dict[str, Any]:
    """Return the time of a private step, and of JAX's own plain one."""
    return {**paired(*_pair(model, n), steps=2), "micro": str(MICRO)}


def memory(model: str, n: int) -> dict[str, Any]:
    """Return the peak memory of private steps one by one, compilation included."""
    return {"MB": growth(lambda: _private(model, n))}


def plain_memory(model: str, n: int) -> dict[str, Any]:
    """Return the peak memory of JAX's own plain steps, compilation included."""
    return {"MB": growth(lambda: _plain(model, n))}


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
