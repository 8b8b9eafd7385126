"""The models that every torch side trains. Nothing of rootnoise is needed here."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Layer(nn.Module):
    """A transformer's encoder layer, its attention of four heads written out: all sides clip it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(192, 3 * 192), nn.Linear(192, 192)
        self.up, self.down = nn.Linear(192, 512), nn.Linear(512, 192)
        self.norms = nn.ModuleList(nn.LayerNorm(192) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return as many tokens."""
        n, tokens, width = x.shape
        heads = self.first(x).view(n, tokens, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        share = torch.softmax(heads[0] @ heads[1].transpose(-1, -2) / 48**0.5, -1)
        seen = (share @ heads[2]).transpose(1, 2).reshape(n, tokens, width)
        x = self.norms[0](x + self.last(seen))
        y: torch.Tensor = self.norms[1](x + self.down(functional.relu(self.up(x))))
        return y


class Encoder(nn.Module):
    """Two encoder layers over 64 tokens of a vocabulary of 1000; 9e5 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(1000, 192), nn.Linear(192, 10)
        self.layers = nn.Sequential(Layer(), Layer())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the scores."""
        y: torch.Tensor = self.out(self.layers(self.table(ids)).mean(1))
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
    "transformer": (Encoder, lambda n: torch.randint(0, 1000, (n, 64))),
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
