"""An Opacus script with its import changed: python examples/with_opacus.py [--tiny].

It trains twice at one (epsilon, delta): with the independent noise that Opacus has, and with the
noise that the planner chooses for this optimizer and this many epochs.
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rootnoise import evaluate
from rootnoise.integrations.opacus import PrivacyEngine  # was: from opacus import PrivacyEngine

EPSILON, DELTA = 2.0, 1e-5


def data(n: int, width: int) -> tuple[TensorDataset, TensorDataset]:
    """Return training and test examples of two classes."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2 * n, width, generator=rng)
    y = (x @ torch.randn(width, generator=rng) > 0).long()
    return TensorDataset(x[:n], y[:n]), TensorDataset(x[n:], y[n:])


def train(n: int, width: int, epochs: int, **noise: str) -> tuple[float, float]:
    """Return test accuracy and epsilon; all between the lines is an Opacus script as it was."""
    training, test = data(n, width)
    # --------------------------------------------------------------------------------------------
    model = nn.Linear(width, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    loader = DataLoader(training, batch_size=32)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        target_epsilon=EPSILON,
        target_delta=DELTA,
        epochs=epochs,
        max_grad_norm=1.0,
        **noise,
    )
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
    epsilon = engine.get_epsilon(DELTA)
    # --------------------------------------------------------------------------------------------
    return evaluate(model, test), epsilon


def main(words: list[str] | None = None) -> None:
    """Print a line for each kind of noise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
    size = (64, 4, 1) if parser.parse_args(words).tiny else (4096, 32, 8)
    for name, noise in {"independent": {"mechanism": "identity"}, "planned": {}}.items():
        accuracy, epsilon = train(*size, **noise)
        print(f"{name} noise: test accuracy {accuracy:.3f} at epsilon {epsilon:.2f}, delta {DELTA}")


if __name__ == "__main__":
    main()
