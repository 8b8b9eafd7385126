"""The table of docs/tutorial.md: `python docs/tutorial.py`, about two minutes of one core."""

from __future__ import annotations

import platform
import statistics

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import rootnoise as rn

EPOCHS = 10
RATES = (0.05, 0.1, 0.2)
ROWS = {
    "no privacy": None,
    "DP-SGD, fixed batches": {"mechanism": "identity"},
    "BSR, fixed batches": {"mechanism": "bsr"},
    "DP-SGD, secret random batches": {"mechanism": "identity", "sampling": "poisson"},
}

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
is_test = torch.arange(len(x)) % 5 == 0
training = TensorDataset(x[~is_test], y[~is_test])
test = TensorDataset(x[is_test], y[is_test])


def accuracy(rate: float, options: dict[str, str] | None) -> float:
    """Train once, as the tutorial does, and return the test accuracy in per cent."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    loader = DataLoader(training, batch_size=64, shuffle=True)
    if options is not None:
        model, optimizer, loader = rn.make_private(
            model, optimizer, loader, epsilon=4, delta=1e-5, epochs=EPOCHS, **options
        )
    for _ in range(EPOCHS):
        for inputs, targets in loader:
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return 100 * rn.evaluate(model, test)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"rootnoise {rn.__version__}, torch {torch.__version__}, {platform.machine()}")
    for name, options in ROWS.items():
        for rate in RATES:
            runs = [accuracy(rate, options) for _ in range(3)]
            mean, spread = statistics.mean(runs), statistics.stdev(runs)
            print(f"| {name} | {rate} | {mean:.1f} +- {spread:.1f} |", flush=True)
