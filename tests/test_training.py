"""Clipping against a slow twin, and noise recovered from a run."""

import numpy as np
import pytest
import torch

from rootnoise.factorization import factorize
from rootnoise.noise import NoiseStream
from rootnoise.participation.samplers import CyclicPoissonSampler, FixedCycleSampler
from rootnoise.training import PrivateOptimizer, privatize
from rootnoise.training.clipping import (
    NonFiniteGradientWarning,
)
from training_cases import (
    BATCH,
    EPOCHS,
    KEY,
    N,
    backward,
    calibrated,
    convolution,
    examples,
    flat,
    linear,
    make,
    slow_sum,
    train,
)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("clip_norm", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_step_equals_the_slow_twin(kind, clip_norm, reduction):
    model, shape = (linear(), (7,)) if kind == "linear" else (convolution(), (1, 4, 4))
    x, y = examples(*shape)
    optimizer = make(model, reduction=reduction, clip_norm=clip_norm)
    noise = NoiseStream(optimizer.mechanism, flat(optimizer, "data").size, KEY)
    for t in range(3):
        batch = optimizer.sampler.batch(t)
        expected = slow_sum(optimizer, x, y, batch) + noise.next().double().numpy()
        backward(optimizer, x, y, batch)
        optimizer.step(batch)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(flat(optimizer, "grad") * BATCH, expected, atol=2e-5 * scale)


def test_divisor_is_the_expected_batch_size_and_an_empty_batch_is_noise():
    made = (CyclicPoissonSampler(N, BATCH, 6, seed=seed) for seed in range(1000))
    sampler = next(sampler for sampler in made if not sampler.batch(0).size)
    module = privatize(linear())
    mechanism = calibrated(sampler, momentum=0.0, bands=1)
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer = PrivateOptimizer(sgd, module, mechanism, sampler, KEY)
    optimizer.step(np.empty(0, dtype=np.int64))
    noise = NoiseStream(mechanism, 40, KEY).next().double().numpy()
    np.testing.assert_allclose(flat(optimizer, "grad"), noise / BATCH, rtol=1e-6)


def test_non_finite_gradients_count_as_zero():
    x, y = examples(7)
    optimizer, twin = make(), make()
    batch = optimizer.sampler.batch(0)
    expected = slow_sum(twin, x, y, batch[1:])
    x[batch[0], 0] = torch.inf
    backward(optimizer, x, y, batch)
    with pytest.warns(NonFiniteGradientWarning, match="1 of 4 per-sample gradients of step 0"):
        optimizer.step(batch)
    noise = NoiseStream(optimizer.mechanism, 40, KEY).next().double().numpy()
    np.testing.assert_allclose(flat(optimizer, "grad") * BATCH, expected + noise, atol=2e-5)
    assert optimizer.non_finite == 1
    assert optimizer.state_dict()["non_finite"] == 1


@pytest.mark.parametrize("decay", [1.0, 0.97])
def test_matched_sgd_releases_the_workload(decay):
    """theta_t = alpha^t theta_0 - lr (A g)_t, Kalinin & Lampert (2024)."""
    x, y = examples(7)
    optimizer = make(decay=decay)
    first = flat(optimizer, "data")
    gradients = []
    for batch in optimizer.sampler:
        backward(optimizer, x, y, batch)
        optimizer.step(batch)
        gradients.append(flat(optimizer, "grad"))
    last = optimizer.mechanism.workload.matrix.apply(np.array(gradients))[-1]
    expected = decay ** len(gradients) * first - 0.1 * last
    np.testing.assert_allclose(flat(optimizer, "data"), expected, atol=1e-5)


def test_other_optimizers_and_frozen_parameters_are_allowed():
    x, y = examples(1, 4, 4)
    model = convolution()
    model[0].requires_grad_(False)
    module = privatize(model)
    adam = torch.optim.Adam(model[3].parameters(), lr=0.01)
    sampler = FixedCycleSampler(N, BATCH, EPOCHS, seed=0)
    optimizer = PrivateOptimizer(adam, module, calibrated(sampler), sampler)
    frozen, moving = model[0].weight.clone(), model[3].weight.clone()
    train(optimizer, x, y, until=2)
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(model[3].weight, moving)


def test_no_global_generator_is_moved():
    x, y = examples(7)
    optimizer = make(key=None)
    numpy_state = np.random.get_state(legacy=False)["state"]["key"].copy()
    torch_state = torch.get_rng_state()
    train(optimizer, x, y, until=3)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], numpy_state)


def looks_white(noise, strategy, std):
    """Whether C times the noise (n, d) is independent with the right standard deviation.

    The mean square of n d normals is off by more than 5.2 of its deviations sqrt(2 / (n d)) with
    probability 2e-7; each of the 17 sums of products at a lag is beyond 5.6 deviations with 2.1e-8.
    Together: less than 6e-7.
    """
    z = strategy.apply(noise) / std
    n, d = z.shape
    if abs(np.mean(z**2) - 1) > 5.2 * np.sqrt(2 / (n * d)):
        return False
    lags = range(1, n)
    return all(abs(np.sum(z[k:] * z[:-k])) < 5.6 * np.sqrt((n - k) * d) for k in lags)


def test_noise_of_a_run_has_the_calibrated_scale_and_correlation():
    size = 3200  # d = 16,005: a scale 2 % off shows as a mean square 15 deviations off
    x, y = examples(size)
    optimizer = make(linear(size))
    noise = []
    for batch in optimizer.sampler:
        clean = slow_sum(optimizer, x, y, batch)
        backward(optimizer, x, y, batch)
        optimizer.step(batch)
        noise.append(flat(optimizer, "grad") * BATCH - clean)
    released, mechanism = np.array(noise), optimizer.mechanism
    strategy, std = mechanism.strategy, mechanism.noise_std
    assert mechanism.strategy.bands == 6
    assert looks_white(released, strategy, std)
    assert not looks_white(released * 1.02, strategy, std)
    assert not looks_white(released * 0.98, strategy, std)
    for bands in (1, 5, 7):
        wrong = factorize(mechanism.workload, mechanism.participation, "bsr", bands=bands).strategy
        assert not looks_white(released, wrong, std)
