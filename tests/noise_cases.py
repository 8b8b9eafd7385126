"""Mechanisms of every kind of map, and what their noise must be by a dense solve."""

from __future__ import annotations

import io
from functools import cache, partial

import numpy as np
import pytest
import torch
from scipy.linalg import solve_triangular

from rootnoise.causal import Dense, Diagonal, Product, Toeplitz
from rootnoise.factorization import factorize, mechanisms
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.noise.sources import AesSource
from rootnoise.participation import FixedCycle, SingleParticipation
from rootnoise.workload import SGD

KEY = Key.from_seed(0)
CHUNK = AesSource.chunk
SINGLE = SingleParticipation()


def mechanism(bands=5, n_steps=40, noise_multiplier=2.0):
    split = factorize(SGD(n_steps, momentum=0.9), SINGLE, "bsr", bands=bands)
    return Mechanism.calibrate(split, SINGLE, noise_multiplier=noise_multiplier, delta=1e-5)


def with_strategy(strategy):
    return Mechanism("test", SGD(strategy.n_steps), SINGLE, strategy, 2.0, 1e-5)


def lower(n):
    """A well-conditioned dense strategy that no structure describes."""
    entries = np.tril(np.random.default_rng(0).normal(size=(n, n)))
    return Dense(entries / n + np.eye(n))


def speeds(n):
    return Diagonal(np.linspace(1, 2, n))


BAND = np.array([1.0, 0.7, 0.4, 0.2])
CASES = {
    "independent": lambda: mechanism(bands=1),
    "two bands": lambda: mechanism(bands=2),
    "banded strategy": lambda: mechanism(bands=7),
    "all bands": lambda: mechanism(bands=40),
    "banded noising": lambda: with_strategy(Toeplitz(BAND, 40).inverse()),
    "scaled columns": lambda: with_strategy(Product(Toeplitz(BAND, 40), speeds(40))),
    "scaled rows": lambda: with_strategy(Product(speeds(40), Toeplitz(BAND, 40).inverse())),
    "two filters": lambda: with_strategy(
        Product(Toeplitz(BAND, 40), Toeplitz(BAND[:2], 40).inverse())
    ),
    "diagonal": lambda: with_strategy(speeds(40)),
    "dense": lambda: with_strategy(lower(40)),
}


@cache  # optimised ones take seconds, and a mechanism is a frozen value
def registered(name):
    split = factorize(SGD(40, 0.5), FixedCycle(10, 4), name)
    return Mechanism.calibrate(split, FixedCycle(10, 4), noise_multiplier=2.0, delta=1e-5)


CASES |= {f"mechanism {name}": partial(registered, name) for name in mechanisms()}


each_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())


def normals(mechanism, n_parameters, key=KEY):
    """Z in float64, position by position as the documents define it: shape (n_steps, d)."""
    source = AesSource(key.derive(f"noise {mechanism.fingerprint}"))
    chunks = range(-(-n_parameters // CHUNK))
    z = np.empty((mechanism.n_steps, len(chunks), 1, CHUNK), dtype=np.float32)
    for t, row in enumerate(z):
        for chunk in chunks:
            source.fill(t, [chunk], row[chunk : chunk + 1])
    return z.reshape(mechanism.n_steps, -1)[:, :n_parameters].astype(np.float64)


def oracle(mechanism, n_parameters):
    """noise_std * C^-1 Z by a dense float64 triangular solve."""
    z = normals(mechanism, n_parameters)
    return mechanism.noise_std * solve_triangular(mechanism.strategy.dense(), z, lower=True)


def run(stream, n_steps=None):
    steps = range(stream.t, stream.n_steps if n_steps is None else n_steps)
    return np.array([stream.next().numpy() for _ in steps])


def assert_close(actual, expected):
    """Agree to a float32 rounding of the row's own size."""
    size = np.sqrt(np.mean(np.square(expected), axis=1, keepdims=True))
    np.testing.assert_allclose(actual / size, expected / size, rtol=0, atol=1e-5)


def through_disk(state):
    """What a checkpoint gives back: no code runs on loading."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def bisr(bands=5, n_steps=40):
    split = factorize(SGD(n_steps, momentum=0.9), SINGLE, "bisr", bands=bands)
    return Mechanism("test", split.workload, SINGLE, split.strategy, 2.0, 1e-5)


def columns(spans):
    return np.concatenate([np.arange(0), *(np.arange(*span) for span in spans)])
