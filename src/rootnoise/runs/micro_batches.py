"""How many examples fit into memory at a time, where the settings do not say."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from rootnoise import _limits

# What an example takes beside what autograd keeps of it: gradients of the same size, and what
# clipping makes of both (windows of a convolution, float64 copies of a block).
TIMES = 4
# Part of the free memory that a micro-batch may take: the rest is for the system and for others.
PART = 0.5


def micro_batch_size(
    model: nn.Module, example: torch.Tensor, held: float, most: int, shared_by: int = 1
) -> int:
    """Return how many examples fit into memory at a time: a power of two below `most`, or `most`.

    No data is read: the model is run on zeros. Neither does it depend on the batch that is drawn,
    since `most` bounds every batch. Powers of two, so that a little less free memory changes little.

    Args:
        model: as it is trained, on its device, not yet private.
        example: of the shape and type of one example; its values are not read.
        held: bytes that are taken whatever the size: noise, say.
        most: examples of the largest batch.
        shared_by: processes that share the memory.
    """
    where = next(model.parameters()).device
    free = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else _limits._free()
    if free is None:
        return most
    room = (free / shared_by - held) * PART
    fit = max(1, int(room / example_bytes(model, example)))
    return most if fit >= most else 2 ** int(math.log2(fit))


def example_bytes(model: nn.Module, example: torch.Tensor) -> float:
    """Return about how many bytes a private step takes for one example more.

    Layers whose gradients are small make one for each example, which is at most the parameters.
    """
    model = copy.deepcopy(model)
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    rows = 2  # some layers refuse a single one
    zeros = torch.zeros(rows, *example.shape, dtype=example.dtype)
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    where = next(model.parameters()).device
    with torch.random.fork_rng(devices), torch.enable_grad(), saved_tensors_hooks(keep, lambda x: x):
        outputs = model(zeros.to(where))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return size + TIMES * (sum(kept.values()) + outputs.untyped_storage().nbytes()) / rows
