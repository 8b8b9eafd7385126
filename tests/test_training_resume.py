"""A resumed run gives the same bits, and a state of another run is refused."""

import io

import numpy as np
import pytest
import torch

from rootnoise._check import RootnoiseError
from rootnoise.participation.samplers import CyclicPoissonSampler
from rootnoise.training import PrivateOptimizer, privatize
from training_cases import (
    BATCH,
    KEY,
    N,
    calibrated,
    examples,
    flat,
    initialised,
    linear,
    make,
    train,
)


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
