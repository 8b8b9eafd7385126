"""How good a model is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

from rootnoise._check import RootnoiseError, integer
from rootnoise.front_door.making import is_training_set

Metric = Callable[..., Any]


def accuracy(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the fraction of rows (n, classes) whose largest entry is at the label.

    >>> accuracy(torch.eye(2), torch.tensor([0, 0]))
    tensor(0.5000)
    """
    return (output.argmax(1) == labels).float().mean()


def evaluate(
    model: nn.Module,
    data: Any,
    metric: Metric = accuracy,
    *,
    batch_size: int = 256,
    release_unnoised: bool = False,
) -> float:
    """Return the mean of a metric over held-out data.

    The model runs in evaluation mode without gradients, on its own device, and then returns to the
    mode it was in, so it is safe to call between two epochs of private training. On the training
    set the result is computed from raw data, and epsilon does not cover it: that is refused, where
    the data set is the very object that `make_private` was given.

    Args:
        model: any model, private or not.
        data: a map-style data set of rows (inputs..., target), or a loader of such batches.
        metric: a function of the model's output and the target: a mean over the rows of a batch.
        batch_size: rows per batch, for a data set.
        release_unnoised: accept the training set.

    Raises:
        RootnoiseError: the model's training set, no rows, or batches that are not (inputs...,
            target).

    >>> from torch.utils.data import TensorDataset
    >>> evaluate(nn.Identity(), TensorDataset(torch.eye(3), torch.tensor([0, 1, 0])))
    0.666...
    """
    if not release_unnoised and is_training_set(model, data):
        raise RootnoiseError(
            "data must be held out, for epsilon does not cover metrics of the training set "
            "(release_unnoised=True computes them), got the training set"
        )
    if isinstance(data, Dataset):
        data = DataLoader(data, integer("batch_size", batch_size, 1))
    where = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    total, rows = 0.0, 0
    try:
        model.eval()
        with torch.no_grad():
            for batch in data:
                if isinstance(batch, Mapping) or not isinstance(batch, tuple | list):
                    kind = type(batch).__name__
                    raise RootnoiseError(f"data must give batches (inputs..., target), got {kind}")
                *inputs, target = tree_map(
                    lambda x: x.to(where) if isinstance(x, torch.Tensor) else x, batch
                )
                n = len(target)
                if n:
                    total += n * float(metric(model(*inputs), target))
                    rows += n
    finally:
        for module, mode in modes:
            module.training = mode
    if not rows:
        raise RootnoiseError("data must have at least one row to evaluate, got none")
    return total / rows
