"""A small loop and its parts, for the tests of `make_private`."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from rootnoise import make_private

EPOCHS, BATCH = 3, 8
GOAL = {"epsilon": 4.0, "delta": 1e-5, "epochs": EPOCHS}


def data(n=24):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(n, 5, generator=rng)
    return TensorDataset(x, (x[:, 0] > 0).long())


def parts(seed=0, **settings):
    with torch.random.fork_rng():
        torch.random.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        model = nn.Linear(5, 2)
    return model, torch.optim.SGD(model.parameters(), **({"lr": 0.5, "momentum": 0.9} | settings))


def train(model, optimizer, loader, *, scheduler=None, epochs=EPOCHS):
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()


def bsr():
    model, sgd = parts()
    run = make_private(model, sgd, data(), batch_size=BATCH, mechanism="bsr", **GOAL)
    return model, sgd, run


def again(**settings):
    model, sgd = parts()
    return make_private(model, sgd, data(), **settings)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])
