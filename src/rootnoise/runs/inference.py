"""The finished model of a run, for predictions: `rootnoise predict`, or `load` in Python.

Predictions for data that were not trained on cost no privacy: they are computed from the released
weights alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from torch import nn

from rootnoise._check import RootnoiseError
from rootnoise.runs.config import RunConfig
from rootnoise.runs.models import build
from rootnoise.runs.settings import as_of_today

# The one entry of the file's metadata: safetensors keeps no order among several.
ABOUT = "rootnoise"
BATCH = 1000


@dataclass(frozen=True)
class Predictions:
    """A model's predictions for N inputs.

    Attributes:
        labels: the likeliest class of each, shape (N,).
        probabilities: of each class (softmax of the logits), shape (N, n_classes).
    """

    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]

    def accuracy(self, labels: ArrayLike) -> float:
        """Return the share of inputs with the right label."""
        return float((self.labels == np.asarray(labels)).mean())


def about(config: RunConfig, input_shape: Sequence[int], n_classes: int) -> dict[str, str]:
    """Return the metadata of model.safetensors: which model `build` makes for these weights."""
    fields = {"model": config.model, "input_shape": list(input_shape), "n_classes": n_classes}
    return {ABOUT: json.dumps(fields)}


@dataclass(frozen=True)
class Finished:
    """The finished model of a run, and what it takes and gives.

    Attributes:
        model: in evaluation mode on the CPU; maps float32 (N, *input_shape) to logits
            (N, n_classes).
        input_shape: shape of one input.
        n_classes: number of classes.
    """

    model: nn.Module
    input_shape: tuple[int, ...]
    n_classes: int

    def predict(self, inputs: ArrayLike | torch.Tensor) -> Predictions:
        """Return what the model says of inputs that are scaled as the run's data are.

        Args:
            inputs: shape (N, *input_shape), or (N, d) with the entries of each input in a row.

        Raises:
            RootnoiseError: inputs of another shape, none, or not finite.
        """
        parts = torch.split(self.shaped(inputs), BATCH)
        with torch.no_grad():
            logits = torch.cat([self.model(part) for part in parts])
        shares = logits.double().softmax(1)
        return Predictions(shares.argmax(1).numpy(), shares.numpy())

    def shaped(self, inputs: ArrayLike | torch.Tensor) -> torch.Tensor:
        """Return inputs as float32 of shape (N, *input_shape), or refuse them as `predict` says."""
        rows = torch.as_tensor(inputs, dtype=torch.float32)
        if rows.ndim < 2 or not len(rows) or rows[0].numel() != math.prod(self.input_shape):
            shape = ", ".join(map(str, ("N", *self.input_shape)))
            rule = f"inputs must be ({shape}), or as many numbers in each of N rows"
            raise RootnoiseError(f"{rule}, got shape {tuple(rows.shape)}")
        if not rows.isfinite().all():
            raise RootnoiseError("inputs must be finite, got NaN or infinite entries")
        return rows.reshape(-1, *self.input_shape)


def load(run_dir: str | Path) -> Finished:
    """Return the finished model of a run, from its model.safetensors.

    Args:
        run_dir: folder of a finished run of `train`.

    Raises:
        RootnoiseError: no finished run, or weights that are not of its model.
    """
    path = Path(run_dir) / "model.safetensors"
    try:
        with safe_open(path, "pt") as file:
            fields = json.loads((file.metadata() or {})[ABOUT])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shape, n_classes = tuple(fields["input_shape"]), fields["n_classes"]
        model = build(fields["model"], shape, n_classes, seed=0)
        model.load_state_dict(weights)
    except OSError:
        rule = "run must be finished, with model.safetensors in its folder"
        raise RootnoiseError(f"{rule}, got {run_dir}") from None
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as reason:
        line = " ".join(f"{reason}".split())
        rule = "model.safetensors must be as a run wrote it"
        raise RootnoiseError(f"{rule}, got {path}: {line:.100}") from None
    return Finished(model.eval(), shape, n_classes)


def settings(run_dir: str | Path) -> RunConfig:
    """Return the settings of a run.

    Raises:
        RootnoiseError: no config.json in its folder, or one that is not of a run.
    """
    try:
        return RunConfig(**as_of_today(json.loads((Path(run_dir) / "config.json").read_bytes())))
    except (OSError, TypeError, ValueError) as reason:
        line = " ".join(f"{reason}".split())
        raise RootnoiseError(f"run must have its config.json, got {run_dir}: {line:.100}") from None
