"""Clipping against a slow twin, noise recovered from a run, resumption, and every refusal."""

import io

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from rootnoise._check import RootnoiseError
from rootnoise.batches.samplers import CyclicPoissonSampler, FixedCycleSampler
from rootnoise.factorization import factorize
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.noise import NoiseStream
from rootnoise.participation import FixedCycle
from rootnoise.training import PrivateOptimizer, privatize
from rootnoise.training.clipping import (
    SLACK,
    Clip,
    NonFiniteGradientWarning,
    clipped_sums,
    row_norms,
)
from rootnoise.workload import SGD

N, BATCH, EPOCHS, CLASSES = 24, 4, 3, 5
KEY = Key.from_seed(1)
CLIP = Clip.fit(1.0, n_examples=N)


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


# ------------------------------------------------------------------------------------ clip and sum


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


def test_no_clipped_gradient_exceeds_the_clip_norm():
    # torch's own float32 norm of this row is 0.8 % too small, its clip factor 0.8 % too large.
    row = torch.full((1, 10_000_000), 0.1)
    true = float(row[0, 0].double()) * row.numel() ** 0.5
    assert float(torch.linalg.vector_norm(row)) < true * (1 - SLACK)
    assert float(row_norms([row])) == pytest.approx(true, rel=SLACK / 10)
    for g in (row, torch.full((1, 300), 1e-3), torch.full((1, 3), 0.57735028)):
        (clipped,), bad = clipped_sums([g], CLIP, t=0)
        assert float((clipped * CLIP.grid).norm()) <= 1
        assert bad == 0
    (small,), _ = clipped_sums([torch.full((1, 300), 1e-3)], CLIP, t=0)
    assert torch.equal(
        (small * CLIP.grid).float(), torch.full((300,), 1e-3)
    )  # below the clip norm nothing changes


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


# ------------------------------------------------------------------------------------------- noise


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


# ------------------------------------------------------------------------------------------ resume


def saved(optimizer):
    """Return state and weights after a trip through a file that allows no code."""
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), optimizer.module.state_dict()], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stop", [0, 1, 5, 17])
def test_resume_gives_the_same_bits(stop):
    x, y = examples(7)
    whole, part, rest = make(decay=0.97), make(decay=0.97), make(initialised(linear()), decay=0.97)
    train(whole, x, y)
    train(part, x, y, until=stop)
    state, weights = saved(part)
    rest.module.load_state_dict(weights)
    rest.load_state_dict(state)
    assert rest.t == stop
    train(rest, x, y)
    assert np.array_equal(flat(rest, "data"), flat(whole, "data"))


def test_poisson_seed_is_resumed():
    def fresh():
        sampler = CyclicPoissonSampler(N, BATCH, 6)
        module = privatize(linear())
        sgd = torch.optim.SGD(module.parameters(), lr=0.1)
        return PrivateOptimizer(sgd, module, calibrated(sampler, bands=1), sampler, KEY)

    one, other = fresh(), fresh()
    assert one.sampler.seed != other.sampler.seed
    other.load_state_dict(saved(one)[0])
    assert all(np.array_equal(a, b) for a, b in zip(one.sampler, other.sampler, strict=True))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 2, "saved version must be 1, got 2"),
        ("decay", 0.5, r"saved decay must be 1.0, got 0.5"),
        ("layout", [["weight", [1]]], "saved layout must be"),
        ("t", 99, r"saved t must be in \[0, 18\], got 99"),
        ("t", 1, "saved noise and ledger must be at step 1, got 2 and 2"),
        ("non_finite", -1, "saved non_finite must be >= 0, got -1"),
        ("noise", None, "saved noise must be a mapping, got None"),
        ("noise.fingerprint", "0", "saved noise's fingerprint must be"),
        ("noise.key_id", "0", "saved noise's key_id must be"),
        ("noise.state", None, "saved noise's state must be a tensor of 40 columns, got None"),
        ("noise.ready", torch.zeros(2, 3), r"must be a tensor of 40 columns, got \(2, 3\)"),
        ("ledger.n_examples", 3, "saved ledger's n_examples must be 24, got 3"),
        ("sampler.batch_size", 5, "saved sampler's batch_size must be 4, got 5"),
        ("optimizer", {}, "saved optimizer must fit this one, got"),
        ("optimizer.param_groups", [], "saved optimizer must fit this one, got"),
    ],
)
def test_load_refuses_another_run_and_changes_nothing(field, value, message):
    x, y = examples(7)
    source, target, twin = make(), make(), make()
    train(source, x, y, until=2)
    state = source.state_dict()
    part, _, name = field.rpartition(".")
    (state[part] if part else state)[name] = value
    with pytest.raises(RootnoiseError, match=message):
        target.load_state_dict(state)
    train(target, x, y, until=4)
    train(twin, x, y, until=4)
    assert np.array_equal(flat(target, "data"), flat(twin, "data"))


@pytest.mark.parametrize("late", ["noise", "ledger"])
def test_load_refuses_noise_and_ledger_of_different_steps(late):
    """Noise that lags behind would protect a second gradient; so would a forgotten batch."""
    x, y = examples(7)
    source = make()
    train(source, x, y, until=1)
    early = source.state_dict()[late]
    train(source, x, y, until=2)
    state = source.state_dict()
    found = {"noise": "1 and 2", "ledger": "2 and 1"}[late]
    target = make()
    with pytest.raises(RootnoiseError, match=f"noise and ledger must be at step 2, got {found}"):
        target.load_state_dict(state | {late: early})
    assert target.t == target.ledger.t == target.stream.t == 0


def test_a_ledger_is_kept_after_loading_not_before(tmp_path):
    x, y = examples(7)
    source, target = make(), make()
    source.ledger.keep(tmp_path / "ledger.bin")
    train(source, x, y, until=2)
    target.ledger.keep(tmp_path / "other.bin")
    rule = r"ledger must be kept in a file after a state is loaded, got .*other.bin before"
    with pytest.raises(RootnoiseError, match=rule):
        target.load_state_dict(source.state_dict())
    with pytest.raises(RootnoiseError, match=rule):
        target.ledger.load_state_dict(source.ledger.state_dict())
    assert target.t == target.ledger.t == 0
    fresh = make()
    fresh.load_state_dict(source.state_dict())
    fresh.ledger.keep(tmp_path / "ledger.bin")
    size = (tmp_path / "ledger.bin").stat().st_size
    train(fresh, x, y, until=3)
    assert (tmp_path / "ledger.bin").stat().st_size > size


@pytest.mark.parametrize("field", ["sigma", "clip_norm", "bands"])
def test_load_refuses_a_changed_mechanism(field):
    value = {"sigma": 0.2, "clip_norm": 0.9, "bands": 5}[field]
    with pytest.raises(RootnoiseError, match="saved noise's fingerprint must be"):
        make(**{field: value}).load_state_dict(make().state_dict())


def test_load_needs_a_fresh_optimizer():
    x, y = examples(7)
    optimizer = make()
    state = optimizer.state_dict()
    train(optimizer, x, y, until=1)
    with pytest.raises(RootnoiseError, match="optimizer must be fresh to load a state, got step 1"):
        optimizer.load_state_dict(state)


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.BatchNorm1d(3), "layer model must not mix examples .* got BatchNorm1d"),
        (nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2)), "layer 0 must not mix"),
        (nn.InstanceNorm1d(3, affine=True, track_running_stats=True), "or keep running statistics"),
        (nn.Linear(3, 2).eval(), "model must be in training mode, got one in evaluation mode"),
        (privatize(nn.Linear(3, 2)), "must be a plain module, got a private PrivateModule: wrap"),
        (privatize(nn.Linear(3, 2))._module, "must be a plain module, got a private Linear: wrap"),
        (
            DistributedDataParallel.__new__(DistributedDataParallel),
            r"PrivateOptimizer takes the process group\), got DistributedDataParallel",
        ),
        (GradSampleModule(nn.Linear(3, 2)), "must be a plain module, got GradSampleModule"),
        (GradSampleModule(nn.Linear(3, 2))._module, "must be a plain module, got Linear of Opacus"),
    ],
)
def test_privatize_refuses_a_model(model, message):
    with pytest.raises(RootnoiseError, match=message):
        privatize(model)


def test_privatize_refuses_another_reduction():
    with pytest.raises(RootnoiseError, match="loss_reduction must be mean or sum, got 'none'"):
        privatize(linear(), "none")


def test_constructor_refuses_parts_that_do_not_fit():
    module = privatize(linear())
    sampler = FixedCycleSampler(N, BATCH, EPOCHS, seed=0)
    mechanism = calibrated(sampler)
    parameters = list(module.parameters())

    def sgd(*groups):
        return torch.optim.SGD([{"params": group} for group in groups], lr=0.1)

    def refused(message, optimizer, module=module, mechanism=mechanism, sampler=sampler, **options):
        with pytest.raises(RootnoiseError, match=message):
            PrivateOptimizer(optimizer, module, mechanism, sampler, **options)

    whole = sgd(parameters)
    wrapper = DPOptimizer(whole, noise_multiplier=1, max_grad_norm=1, expected_batch_size=4)
    refused("that needs no closure, got DPOptimizer", wrapper)
    refused("that needs no closure, got LBFGS", torch.optim.LBFGS(parameters))
    refused("optimizer must be a torch one that needs no closure, got str", "sgd")
    refused("must be wrapped by privatize", whole, module=module._module)
    refused("2 trainable parameters once and no other, got 1, among them 1", sgd(parameters[:1]))
    stranger = [nn.Parameter(torch.zeros(1))]
    refused("got 3, among them 2", sgd(parameters, stranger))
    refused("got 1, among them 0", sgd(stranger))
    refused(r"decay must be a finite number > 0 and <= 1, got 0.0", whole, decay=0)
    refused("key must be a Key, got int", whole, key=1)
    longer = FixedCycleSampler(N, BATCH, EPOCHS + 1, seed=0)
    refused("sampler must draw by the mechanism's participation", whole, sampler=longer)
    shorter = FixedCycleSampler(N, BATCH, EPOCHS, seed=0, n_steps=17)
    assert shorter.participation == FixedCycle(6, 3)
    refused(r"sampler's n_steps must be in \[18, 18\], got 17", whole, sampler=shorter)
    complex_module = privatize(nn.Linear(2, 2, dtype=torch.complex64))
    complex_sgd = torch.optim.SGD(complex_module.parameters(), lr=0.1)
    refused("real floating-point", complex_sgd, module=complex_module)
    module.eval()
    refused("model must be in training mode", whole)


def test_step_refuses_a_bad_batch_and_can_go_on():
    x, y = examples(7)
    optimizer, twin = make(), make()
    first, second = optimizer.sampler.batch(0), optimizer.sampler.batch(1)

    def refused(message, batch):
        with pytest.raises(RootnoiseError, match=message):
            optimizer.step(batch)

    refused("per-sample gradients of _module.weight are missing", first)
    backward(optimizer, x, y, first)
    refused(r"indices must be one a gradient row \(4\), got 3", first[:3])
    refused(r"indices must be one a gradient row \(4\), got 0", first[:0])
    refused(r"indices must be in \[0, n_examples=24\), got 24", [0, 1, 2, 24])
    refused("indices must be distinct", [0, 1, 1, 2])
    refused("indices must be 1-D integers", [0.5, 1, 2, 3])
    refused("step must get the indices of the batch, got a closure", lambda: None)
    cross_entropy(optimizer.module(x[first]), y[first]).backward()
    refused("forward must run once a step .*, got 2 in training mode since the last step", first)
    assert optimizer.t == 0
    train(optimizer, x, y, until=1)
    backward(optimizer, x, y, second)
    refused("breaks the participation", first)
    train(optimizer, x, y, until=3)
    train(twin, x, y, until=3)
    assert np.array_equal(flat(optimizer, "data"), flat(twin, "data"))


def test_step_takes_tensor_indices_and_ends_with_the_mechanism():
    x, y = examples(7)
    optimizer = make()
    train(optimizer, x, y, until=17)
    batch = optimizer.sampler.batch(17)
    backward(optimizer, x, y, batch)
    optimizer.step(torch.from_numpy(batch))
    backward(optimizer, x, y, batch)
    with pytest.raises(RootnoiseError, match=r"t must be in \[0, n_steps - 1=17\], got 18"):
        optimizer.step(batch)


def test_step_refuses_changed_parameters():
    x, y = examples(7)

    def refused(message, alter):
        optimizer = make()
        train(optimizer, x, y, until=1)
        batch = optimizer.sampler.batch(1)
        backward(optimizer, x, y, batch)
        alter(optimizer, optimizer.module._module)
        with pytest.raises(RootnoiseError, match=message):
            optimizer.step(batch)

    def add(optimizer, model):
        optimizer.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})

    def freeze(optimizer, model):
        model.bias.requires_grad_(False)

    def reshape(optimizer, model):
        model.bias.data = model.bias.data[None]

    def replace(optimizer, model):
        model.bias = nn.Parameter(model.bias.detach().clone())
        optimizer.optimizer.param_groups[0]["params"][1] = model.bias

    refused("got 3, among them 2", add)
    refused("1 trainable parameters once and no other, got 2", freeze)
    refused("trainable parameters must stay those of the first step", reshape)
    refused("trainable parameters must stay those of the first step", replace)


def test_a_broken_off_step_cannot_be_repeated():
    x, y = examples(7)
    optimizer = make()
    train(optimizer, x, y, until=1)
    batch = optimizer.sampler.batch(1)
    backward(optimizer, x, y, batch)

    def interrupt(*_):
        raise KeyboardInterrupt

    optimizer.optimizer.register_step_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(batch)
    backward(optimizer, x, y, batch)
    with pytest.raises(RootnoiseError, match=r"step 1 was broken off \(ledger at 2, noise at 2\)"):
        optimizer.step(batch)
    with pytest.raises(RootnoiseError, match="resume from a saved state"):
        optimizer.state_dict()


def test_the_step_after_the_last_is_refused_with_its_cure():
    x, y = examples(7)
    optimizer = make()
    train(optimizer, x, y)
    backward(optimizer, x, y, optimizer.sampler.batch(17))
    line = "got 18: the mechanism's steps are used up; calibrate one for all the steps to be made"
    with pytest.raises(RootnoiseError, match=line):
        optimizer.step([])
