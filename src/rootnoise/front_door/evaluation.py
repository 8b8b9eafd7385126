"""How good a model is on held-out data: metrics of the training set are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from rootnoise._check import RootnoiseError, integer
from rootnoise.front_door.making import training_set

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
    a record is recognised as one that `make_private` was given, by its data set or by the memory of
    a `TensorDataset`. A copy is not recognised.

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
    if not release_unnoised and _overlap(training_set(model), data):
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


def _overlap(trained: Any, data: Any) -> bool:
    """Whether `data`, a data set or a loader, is recognised to share a record with the other."""
    if trained is None:
        return False
    if data is trained or getattr(data, "dataset", None) is trained:
        return True
    found, known = _records(data), _records(trained)
    if found is None or known is None or found[0] != known[0]:
        return False
    return bool(np.intersect1d(found[1], known[1]).size)


def _records(data: Any) -> tuple[Any, NDArray[np.int64]] | None:
    """Return where the records are, and the number of each there, if that can be said.

    Those of a `TensorDataset` are at addresses of a device's memory, so that slices of one tensor
    compare, whoever holds them.
    """
    if isinstance(data, Subset):
        whole = _records(data.dataset)
        return whole and (whole[0], whole[1][np.asarray(data.indices, dtype=np.int64)])
    if isinstance(data, TensorDataset):
        first = data.tensors[0]
        if first.layout != torch.strided or not first.numel() or not first.stride(0):
            return None
        step = first.stride(0) * first.element_size()
        return str(first.device), first.data_ptr() + step * np.arange(len(first))
    if not isinstance(data, Dataset) and hasattr(data, "dataset"):  # a loader
        return _records(data.dataset)
    return (id(data), np.arange(len(data))) if hasattr(data, "__len__") else None
