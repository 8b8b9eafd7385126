"""Two live optimizers of one key and mechanism: bit-exact repeats pass, two gradients do not."""

import gc

import pytest
import torch
from torch import nn

from rootnoise._check import RootnoiseError
from rootnoise.factorization import factorize
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.participation import FixedCycle
from rootnoise.participation.samplers import FixedCycleSampler
from rootnoise.training import PrivateOptimizer, privatize, reuse
from rootnoise.training.reuse import Releases, _digest
from rootnoise.workload import prefix_sum

LANES = 64
RULE = "^noise of step 1 must not protect two gradients: another live optimizer has released a"


def make(key, sigma=1.0):
    sampler = FixedCycleSampler(12, 3, 2, seed=0)
    split = factorize(prefix_sum(sampler.n_steps), FixedCycle(4, 2), "bsr")
    mechanism = Mechanism.calibrate(split, FixedCycle(4, 2), noise_multiplier=sigma, delta=1e-5)
    module = privatize(nn.Linear(90, 1, bias=False), "sum")
    nn.init.zeros_(module._module.weight)
    sgd = torch.optim.SGD(module.parameters(), lr=1.0)
    return PrivateOptimizer(sgd, module, mechanism, sampler, key)


def step(optimizer, value=1.0):
    batch = optimizer.sampler.batch(optimizer.t)
    optimizer.zero_grad()
    optimizer.module(torch.full((len(batch), 90), value)).sum().backward()
    optimizer.step(batch)


def test_a_second_gradient_under_the_same_noise_is_refused_before_it_is_released():
    key = Key.fresh()
    first, second = make(key), make(key)
    step(first)
    step(first)
    step(second)
    before = second.module._module.weight.detach().clone()
    with pytest.raises(RootnoiseError, match=RULE):
        step(second, value=-1.0)
    assert torch.equal(second.module._module.weight, before)
    assert second.t == 1
    with pytest.raises(RootnoiseError, match="step 1 was broken off"):
        step(second)
    step(first)


def test_the_second_one_may_lead():
    key = Key.fresh()
    first, second = make(key), make(key)
    step(first)
    step(second)
    step(second, value=-1.0)
    with pytest.raises(RootnoiseError, match=RULE):
        step(first)


def test_a_resumed_run_repeats_its_steps_and_no_others():
    key = Key.fresh()
    first = make(key)
    step(first)
    state, weights = first.state_dict(), first.module.state_dict()
    weights = {name: w.clone() for name, w in weights.items()}
    step(first)
    honest, other = make(key), make(key)
    for resumed in (honest, other):
        resumed.load_state_dict(state)
        resumed.module.load_state_dict(weights)
    step(honest)
    step(honest)
    assert honest.t == 3
    with pytest.raises(RootnoiseError, match=RULE):
        step(other, value=-1.0)


def test_other_keys_other_mechanisms_and_dead_optimizers_do_not_matter():
    key = Key.fresh()
    first = make(key)
    step(first)
    step(make(Key.fresh()), value=-1.0)
    step(make(key, sigma=2.0), value=-1.0)
    first.loop = first  # dead only when the collector has run
    gc.disable()
    try:
        del first
        step(make(key), value=-1.0)
    finally:
        gc.enable()


def of_a_gpu(release):
    return reuse._fletcher(release, LANES).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("digest", [_digest, of_a_gpu])
def test_every_bit_of_a_release_counts(digest, dtype, monkeypatch):
    monkeypatch.setitem(reuse.LANES, "cpu", LANES)
    base = torch.randn(3 * LANES + 5, dtype=dtype)
    assert digest(base) == digest(base.clone())
    seen = {digest(base)}
    whole, bits = (torch.int32, 31) if dtype == torch.float32 else (torch.int64, 63)
    for i in range(len(base)):
        changed = base.clone()
        changed.view(whole)[i] ^= 1 << (i % bits)
        seen.add(digest(changed))
    swapped = base.clone()
    swapped[[0, LANES]] = base[[LANES, 0]]
    seen.add(digest(swapped))
    assert len(seen) == len(base) + 2


def test_the_same_mean_of_another_sum_is_another_release():
    """Whoever knows both divisors knows both sums, and so their difference."""
    one, other = Releases("k", "divisor"), Releases("k", "divisor")
    mean = torch.ones(3)
    one.check(1, mean, 4)
    with pytest.raises(RootnoiseError, match=RULE):
        other.check(1, mean, 5)
    Releases("k", "divisor").check(1, mean, 4)


def test_steps_before_the_first_are_unknown():
    one, other = Releases("k", "f"), Releases("k", "f")
    one.check(5, torch.ones(3, dtype=torch.float64))
    for t in (3, 4):
        other.check(t, torch.zeros(3, dtype=torch.float64))
    with pytest.raises(RootnoiseError, match=RULE.replace("1", "5")):
        other.check(5, torch.zeros(3, dtype=torch.float64))
    assert len(one._family) == 2


def test_a_step_in_the_middle_may_be_repeated():
    one, other = Releases("k", "middle"), Releases("k", "middle")
    parts = [torch.full((3,), float(t), dtype=torch.float64) for t in range(3)]
    for t in range(3):
        one.check(t, parts[t])
    other.check(1, parts[1])
    with pytest.raises(RootnoiseError, match=RULE.replace("1", "2")):
        other.check(2, parts[1])
