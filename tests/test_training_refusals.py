"""What `privatize`, the optimizer and its step refuse, each in one line."""

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from rootnoise._check import RootnoiseError
from rootnoise.participation import FixedCycle
from rootnoise.participation.samplers import FixedCycleSampler
from rootnoise.training import PrivateOptimizer, privatize
from training_cases import (
    BATCH,
    EPOCHS,
    N,
    backward,
    calibrated,
    examples,
    flat,
    linear,
    make,
    train,
)


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

    refused("per-sample gradients of weight are missing", first)
    backward(optimizer, x, y, first)
    refused(r"indices must be one a gradient row \(4\), got 3", first[:3])
    refused(r"indices must be one a gradient row \(4\), got 0", first[:0])
    refused(r"indices must be in \[0, n_examples=24\), got 24", [0, 1, 2, 24])
    refused("indices must be distinct", [0, 1, 1, 2])
    refused("indices must be 1-D integers", [0.5, 1, 2, 3])
    refused("step must get the indices of the batch, got a closure", lambda: None)
    refused(r"step must get the indices of the batch, got none \(the optimizer of make_pri", None)
    for call in (optimizer.step, optimizer.accumulate):
        with pytest.raises(RootnoiseError, match=r"^step must get the indices .*, got none"):
            call()
    with pytest.raises(RootnoiseError, match=r"^saved state must be a mapping, got NoneType$"):
        optimizer.load_state_dict(None)
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
