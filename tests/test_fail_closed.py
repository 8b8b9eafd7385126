"""Every refusal that the design names, in its order: one line, before anything is released."""

import re
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from opacus.optimizers import (
    AdaClipDPOptimizer,
    DPOptimizer,
    DPOptimizerFastGradientClipping,
    DPPerLayerOptimizer,
)
from torch import nn

from rootnoise._check import RootnoiseError
from rootnoise.causal import Toeplitz
from rootnoise.factorization import factorize
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.noise import NoiseStream
from rootnoise.participation import CyclicPoisson, FixedCycle
from rootnoise.participation.ledger import Ledger
from rootnoise.participation.samplers import FixedCycleSampler
from rootnoise.participation.sensitivity import sensitivity
from rootnoise.training import PrivateOptimizer, privatize
from rootnoise.training.clipping import NonFiniteGradientWarning
from rootnoise.workload import prefix_sum

KEY = Key.from_seed(1)
CYCLE = FixedCycle(3, 2)


def mechanism(n_steps=6, bands=2, **fields):
    split = factorize(prefix_sum(n_steps), CYCLE, "bsr", bands=bands)
    return Mechanism.calibrate(
        split, CYCLE, **({"epsilon": 4.0, "delta": 1e-5, "clip_norm": 1.0} | fields)
    )


def parts(m=None, key=KEY, wrap=None):
    m = m or mechanism()
    sampler = FixedCycleSampler(6, 2, 2, seed=0, n_steps=m.n_steps)
    torch_state = torch.random.get_rng_state()
    module = privatize(nn.Linear(2, 1, bias=False))
    torch.random.set_rng_state(torch_state)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    sgd = torch.optim.SGD(module.parameters(), lr=1.0)
    return PrivateOptimizer(wrap(sgd) if wrap else sgd, module, m, sampler, key), module


def step(optimizer, module, batch=None, value=1.0):
    batch = optimizer.sampler.batch(optimizer.t) if batch is None else np.array(batch)
    optimizer.zero_grad()
    module(torch.full((len(batch), 2), value)).sum().backward()
    optimizer.step(batch)


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def refused_and_unchanged(optimizer, module, message, **arguments):
    before, t = weights(module), optimizer.t
    with pytest.raises(RootnoiseError, match=message) as refusal:
        step(optimizer, module, **arguments)
    assert "\n" not in str(refusal.value)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(module), strict=True))
    assert optimizer.t == t


def test_a_step_past_the_last():
    optimizer, module = parts()
    for _ in range(6):
        step(optimizer, module)
    refused_and_unchanged(
        optimizer, module, r"^t must be in \[0, n_steps - 1=5\], got 6: .*calibrate one", batch=[0]
    )
    stream = NoiseStream(mechanism(), 2, KEY)
    for _ in range(6):
        stream.next()
    with pytest.raises(
        RootnoiseError, match=r"^step 6 is past the mechanism's n_steps=6: its priv"
    ):
        stream.next()


def test_a_batch_that_breaks_the_participation():
    optimizer, module = parts()
    batch = optimizer.sampler.batch(0)
    step(optimizer, module)
    message = f"^example {batch[0]} at step 1 breaks the participation "
    refused_and_unchanged(optimizer, module, message, batch=batch)
    step(optimizer, module)  # the step itself is still to be had


@pytest.mark.parametrize(
    "other",
    [
        lambda: mechanism(epsilon=3.0),
        lambda: mechanism(clip_norm=2.0),
        lambda: mechanism(n_steps=5),
        lambda: mechanism(bands=3),
        lambda: mechanism(delta=1e-6),
    ],
    ids=["sigma", "clip", "n_steps", "mechanism", "delta"],
)
def test_another_mechanism_on_resume(other):
    optimizer, module = parts()
    step(optimizer, module)
    with pytest.raises(RootnoiseError, match=r"^saved noise's fingerprint must be "):
        parts(other())[0].load_state_dict(optimizer.state_dict())
    parts()[0].load_state_dict(optimizer.state_dict())  # the same one is welcome


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_count_as_zero(value):
    with_them, module = parts()
    with pytest.warns(
        NonFiniteGradientWarning, match=r"^2 of 2 per-sample gradients of step 0 are"
    ):
        step(with_them, module, value=value)
    assert with_them.non_finite == 2
    alone, noise_only = parts()
    step(alone, noise_only, value=0.0)
    for a, b in zip(weights(module), weights(noise_only), strict=True):
        assert torch.equal(a, b)


WRAPPERS = {
    "DPOptimizer": lambda o: DPOptimizer(
        o, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=2
    ),
    # Adaptive clipping: the clip norm follows the data, and the claim does not.
    "AdaClipDPOptimizer": lambda o: AdaClipDPOptimizer(
        o,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=2,
        target_unclipped_quantile=0.5,
        clipbound_learning_rate=0.2,
        max_clipbound=10.0,
        min_clipbound=0.1,
        unclipped_num_std=1.0,
    ),
    "DPPerLayerOptimizer": lambda o: DPPerLayerOptimizer(
        o, noise_multiplier=1.0, max_grad_norm=[1.0], expected_batch_size=2
    ),
    "DPOptimizerFastGradientClipping": lambda o: DPOptimizerFastGradientClipping(
        o, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=2
    ),
    "LBFGS": lambda o: torch.optim.LBFGS(o.param_groups[0]["params"]),
    "Averaged": lambda o: type("Averaged", (), {"param_groups": o.param_groups})(),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_adaptive_clipping_and_other_optimizers(name):
    message = f"optimizer must be a torch one that needs no closure, got {name}"
    with pytest.raises(RootnoiseError, match=f"^{re.escape(message)}$"):
        parts(wrap=WRAPPERS[name])


def test_the_clip_norm_cannot_follow_the_data():
    optimizer, _ = parts()
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'clip_norm'"):
        optimizer.mechanism.clip_norm = 2.0
    assert (
        replace(optimizer.mechanism, clip_norm=2.0).fingerprint != optimizer.mechanism.fingerprint
    )


def test_a_strategy_whose_sensitivity_is_unknown():
    strategy = Toeplitz(np.array([1.0, 0.5, 0.25]), 6)
    with pytest.raises(RootnoiseError, match=r"^bands must be in \[1, groups=2\] under cyclic Poi"):
        sensitivity(strategy, CyclicPoisson(2, 0.5))
    with pytest.raises(
        RootnoiseError, match=r"^strategy must be finite, got |^coefficients must be"
    ):
        sensitivity(Toeplitz(np.array([1.0, np.nan]), 6), CYCLE)


def test_a_key_that_is_used_again(tmp_path):
    # To overwrite it, to go back with it, and to give its noise to another batch after a crash.
    KEY.save(tmp_path / "noise.key")
    with pytest.raises(RootnoiseError, match=r"^key file must not exist yet, got "):
        Key.fresh().save(tmp_path / "noise.key")
    optimizer, module = parts()
    start = optimizer.state_dict()
    step(optimizer, module)
    with pytest.raises(
        RootnoiseError, match=r"^optimizer must be fresh to load a state, got step 1"
    ):
        optimizer.load_state_dict(start)
    with pytest.raises(
        RootnoiseError, match=r"^noise stream must be at step 0 to load a state, go"
    ):
        optimizer.stream.load_state_dict(start["noise"])
    with pytest.raises(RootnoiseError, match=r"^saved noise's key_id must be "):
        parts(key=Key.from_seed(2))[0].load_state_dict(start)
    ledger = Ledger(CYCLE, 6)
    ledger.keep(tmp_path / "ledger.bin")
    state = ledger.state_dict()
    ledger.admit(0, [1, 2])
    resumed = Ledger(CYCLE, 6)
    resumed.load_state_dict(state)
    resumed.keep(tmp_path / "ledger.bin")
    with pytest.raises(
        RootnoiseError, match=r"^step 0 must repeat its batch of before the run was"
    ):
        resumed.admit(0, [1, 3])
