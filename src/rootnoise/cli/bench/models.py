"""The models that every torch side trains. Nothing of rootnoise is needed here."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Encoder(nn.Module):
    """Linear and LayerNorm alone over 64 tokens of a vocabulary of 1000: every side clips it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(1000, 192), nn.Linear(192, 10)
        self.up = nn.ModuleList(nn.Linear(192, 512) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(512, 192) for _ in range(3))
        self.norm = nn.ModuleList(nn.LayerNorm(192) for _ in range(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the scores."""
        x: torch.Tensor = self.table(ids)
        for up, down, norm in zip(self.up, self.down, self.norm, strict=True):
            x = norm(x + down(functional.relu(up(x))))
        y: torch.Tensor = self.out(x.mean(1))
        return y


def perceptron() -> nn.Module:
    """Return three layers with 1e6 parameters."""
    hidden = nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 200), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(200, 10))


def cnn() -> nn.Module:
    """Return two convolutions and two layers with 4e5 parameters."""
    first = nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    last = nn.Flatten(), nn.Linear(3136, 120), nn.ReLU(), nn.Linear(120, 10)
    return nn.Sequential(*first, *second, *last)


def small(inputs: int, seed: int) -> nn.Module:
    """Return the classifier of the comparison of accuracies, with initial weights of a seed."""
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor]]] = {
    "perceptron": (perceptron, lambda n: torch.randn(n, 784)),
    "cnn": (cnn, lambda n: torch.randn(n, 1, 28, 28)),
    "tokens": (Encoder, lambda n: torch.randint(0, 1000, (n, 64))),
}


def batch(model: str, n: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return a model and a batch for it."""
    make, draw = MODELS[model]
    return make(), draw(n), torch.randint(0, 10, (n,))


def plain_step(model: str, n: int) -> Callable[[], None]:
    """Return what makes one step of SGD without privacy."""
    net, x, y = batch(model, n)
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3)

    def step() -> None:
        sgd.zero_grad()
        functional.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
        sgd.step()

    return step


def held(data: str) -> tuple[torch.Tensor, ...]:
    """Return the inputs and labels to train on, and those to test on, of a file of arrays."""
    arrays = np.load(data)
    return tuple(torch.from_numpy(arrays[name]) for name in ("x", "y", "test_x", "test_y"))


def trained(
    private: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    epochs: int,
    test: tuple[torch.Tensor, torch.Tensor],
) -> float:
    """Train in a plain loop, and return the test accuracy."""
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            functional.cross_entropy(private(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        return float((private.eval()(test[0]).argmax(1) == test[1]).double().mean())
