"""How much memory a step takes, and how many examples fit at a time if the settings do not say."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from rootnoise import _limits
from rootnoise.training.clip import PrivateModule

# The most bytes of all tensors at once, as torch's profiler counts on a CPU, in steps with a probe
# of the five built-in models on 64 to 12,288 numbers an example and 1 to 512 examples: of each
# example 6.06 times what its passes leave (logistic; mlp 5.7, resnet18 5.5, transformer 4.5, cnn
# 4.6), 4.04 times the parameters (resnet18: float64 sum, gradient, momentum), and 1 MB of blocks.
TIMES, FIXED, BLOCKS = 6.5, 5.0, 4e6
# Part of the free memory that they may take. A process of its own grew by 0.6 to 1.26 times this
# estimate where that was above 30 MB (mlp 1.26, logistic 1.16, transformer 1.01, resnet18 0.99, cnn
# 0.82), since what is freed cannot be used again at once. The rest is for others.
PART = 0.5


@dataclass(frozen=True)
class StepMemory:
    """What a private step takes beside parameters, noise and data, in bytes: an upper estimate.

    Attributes:
        fixed: whatever the number of examples: sums, gradients, momentum and blocks.
        each: for each example of a micro-batch.
    """

    fixed: float
    each: float

    @classmethod
    def of(cls, model: nn.Module, example: torch.Tensor) -> StepMemory:
        """Return that of a model on its device, not yet private, by a step of zeros on a copy.

        No data is read: only shape and type of `example`.
        """
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        return cls(FIXED * size + BLOCKS, TIMES * _kept(copy.deepcopy(model), example))

    def bytes(self, rows: int) -> float:
        """Return that of micro-batches of so many examples."""
        return self.fixed + rows * self.each

    def fitting(self, free: float, most: int) -> int:
        """Return how many examples fit at a time: a power of two below `most`, or `most`.

        It does not depend on the batch that is drawn, since `most` bounds every batch. Powers of
        two: a little less free memory changes nothing.
        """
        fit = max(1.0, (free * PART - self.fixed) / self.each)
        return most if fit >= most else 2 ** int(math.log2(fit))


def free_memory(where: torch.device) -> float:
    """Return the free bytes of a device, infinite where they are not known."""
    free = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else _limits._free()
    return math.inf if free is None else float(free)


def _kept(model: nn.Module, example: torch.Tensor) -> float:
    """Return the bytes of an example that forward keeps for backward, and backward for the sums."""
    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    rows = 2  # some layers refuse a single one
    where = next(model.parameters()).device
    zeros = torch.zeros(rows, *example.shape, dtype=example.dtype, device=where)
    with (
        torch.random.fork_rng([where] if where.type == "cuda" else []),
        torch.enable_grad(),
        saved_tensors_hooks(keep, lambda x: x),
        warnings.catch_warnings(action="ignore"),
    ):
        private = PrivateModule(model, "sum", guarded=True)  # what it warns of, training does
        loss = private(zeros).square().sum()  # its gradient is as large as the outputs
    loss.backward()
    left = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in private.left}
    return (sum(kept.values()) + sum(left.values())) / rows
