"""How an auditor broke the guarantee by use: refused steps again, hooks, modes, other noise."""

import pytest
import torch
from torch import nn

from rootnoise import (
    FixedCycleSampler,
    Key,
    Mechanism,
    PrivateOptimizer,
    RootnoiseError,
    factorize,
    privatize,
)
from rootnoise.workload import SGD

N, BATCH = 24, 6
X, Y = torch.sin(torch.arange(N * 5.0) ** 2).view(N, 5), torch.arange(N) * 5 % 7 % 3
LOSS = nn.functional.cross_entropy


def make(model=None, *, epsilon=2.0, key=None, lr=0.1, **options):
    sampler = FixedCycleSampler(N, BATCH, 5, seed=0)
    who = sampler.participation
    split = factorize(SGD(sampler.n_steps, momentum=0.9), who, "bsr")
    mechanism = Mechanism.calibrate(split, who, epsilon=epsilon, delta=1e-5)
    if model is None:
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(3)
            model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    module = privatize(model)
    sgd = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9)
    return PrivateOptimizer(sgd, module, mechanism, sampler, key, **options)


def step(optimizer, loss=LOSS):
    batch = optimizer.sampler.batch(optimizer.t)
    optimizer.zero_grad()
    loss(optimizer.module(X[batch]), Y[batch]).backward()
    optimizer.step(batch)


def mixing(out, y):
    return LOSS(out - out.mean(0), y)


def weights(optimizer):
    return torch.cat([p.detach().flatten() for p in optimizer.module.parameters()]).clone()


# A refused probe is forgotten: `step` again releases the very step that was refused.
def test_a_refused_step_is_refused_again():
    optimizer = make()
    batch = optimizer.sampler.batch(0)
    mixing(optimizer.module(X[batch]), Y[batch]).backward()
    for _ in range(2):
        with pytest.raises(RootnoiseError, match="must not mix the examples of a batch"):
            optimizer.step(batch)
    assert optimizer.t == 0
    step(optimizer)  # zero_grad begins anew
    assert optimizer._probe.probed == [0]


# So is one that an interrupt broke off (Ctrl-C in a notebook, then the cell of the step again).
def test_a_probe_that_was_broken_off_is_no_probe(monkeypatch):
    optimizer = make()
    batch = optimizer.sampler.batch(0)
    mixing(optimizer.module(X[batch]), Y[batch]).backward()
    with monkeypatch.context() as patch:

        def interrupted(*_):
            raise KeyboardInterrupt

        patch.setattr(type(optimizer._probe), "_compare", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(batch)
    with pytest.raises(RootnoiseError, match="whose probe was broken off"):
        optimizer.step(batch)
    assert optimizer.t == 0
    step(optimizer)


# A hook on the model's output mixes gradients on the way back; the probe's own hook comes first.
@pytest.mark.parametrize(
    "hook",
    [lambda g: g / g.norm(), lambda g: g - g.mean(0), lambda g: g * g.std()],
    ids=["norm", "mean", "deviation"],
)
@pytest.mark.parametrize("model", [lambda: None, lambda: nn.Linear(5, 3)], ids=["deep", "linear"])
def test_hooks_on_the_output_do_not_mix_unseen(hook, model):
    optimizer = make(model())

    def loss(out, y):
        out.register_hook(hook)
        return LOSS(out, y)

    with pytest.raises(RootnoiseError, match=r"loss must be made by torch.s own functions"):
        step(optimizer, loss)
    assert optimizer.t == 0


def test_hooks_that_only_look_are_allowed():
    optimizer = make()
    seen: list[torch.Tensor] = []

    def loss(out, y):
        out.register_hook(seen.append)
        return LOSS(out, y)

    step(optimizer, loss)
    assert optimizer.t == 1
    assert seen


# `model.training = False` with layers in training: Opacus keeps them, the guard does not count,
#    so the released step holds the gradients of a batch that the ledger never saw.
@pytest.mark.parametrize("independence", ["assumed", "probed"])
def test_a_pass_is_counted_by_its_layers_mode(independence):
    released = []
    for unseen in (False, True):
        optimizer = make(epsilon=1e6, key=Key.from_seed(1), independence=independence)
        for _ in range(3):
            step(optimizer)
        batch, module = optimizer.sampler.batch(3), optimizer.module
        optimizer.zero_grad()
        out = module(X[batch])
        try:
            if unseen:
                module._module.training = False  # as a train() of one's own may do
                other = module(10 * X[batch] + 1)
                module._module.training = True
                LOSS(other, 2 - Y[batch]).backward()
            LOSS(out, Y[batch]).backward()
            optimizer.step(batch)
        except RootnoiseError:
            return
        released.append(weights(optimizer))
        del optimizer, module, out
    alone, both = released
    assert torch.allclose(alone, both, atol=1e-3)


# Usability: part of the layers in evaluation mode gives a raw error of Opacus.
def test_layers_in_different_modes_are_refused_by_name():
    optimizer = make()
    optimizer.module._module.eval()
    optimizer.module._module[2].train()
    with pytest.raises(RootnoiseError, match=r"layer 0 .*training mode"):
        step(optimizer)
    assert optimizer.t == 0


# `sgd.step()` in place of `optimizer.step(batch)` trains on raw gradients and nobody says so.
def test_the_inner_optimizer_makes_no_raw_step():
    optimizer = make()
    before, batch = weights(optimizer), optimizer.sampler.batch(0)
    LOSS(optimizer.module(X[batch]), Y[batch]).backward()
    optimizer.optimizer.step()  # it finds no gradient
    assert torch.equal(weights(optimizer), before)


# Another stream, of a weaker mechanism, in place of the run's own.
def test_the_noise_is_that_of_the_mechanism():
    optimizer, weak = make(), make(epsilon=1e5)
    with pytest.raises(AttributeError, match="stream"):
        optimizer.stream = weak.stream
    assert optimizer.t == 0
