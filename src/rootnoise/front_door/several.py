"""`make_private` in several processes: which share a run, and that all bring the same parts."""

from __future__ import annotations

import hashlib
import os
import random  # noqa: TID251 - its state is put back
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rootnoise._check import RootnoiseError
from rootnoise.front_door import saved
from rootnoise.keys import Key
from rootnoise.training.ranks import Ranks

# Records whose contents are compared, of a data set that is not in memory.
COMPARED = 16


def together(model: nn.Module) -> tuple[nn.Module, Ranks]:
    """Return the model without DDP, which would add up raw gradients, and the ranks that train it.

    They are those of DDP, those that FSDP2 has cut the model over, or else all processes: runs of
    their own on the same data would each cost epsilon.

    Raises:
        RootnoiseError: a launcher has started several processes that have not met.
    """
    if isinstance(model, DistributedDataParallel):
        return model.module, Ranks(model.process_group)
    for p in model.parameters():
        if isinstance(p, DTensor):
            return model, Ranks(p.device_mesh.get_group(0))
    if dist.is_initialized():
        return model, Ranks(dist.group.WORLD)
    started = os.environ.get("WORLD_SIZE", "1")
    if started not in ("", "1"):
        raise RootnoiseError(
            "processes of a run must meet before make_private (torch.distributed."
            f"init_process_group), got {started} of a launcher that have not"
        )
    return model, Ranks()


def compare(ranks: Ranks, dataset: Any, settings: Mapping[str, Any]) -> None:
    """Refuse settings or data that differ between ranks; before, no global generator is moved.

    A data set split anew in each process would give one index to two people.
    """
    if ranks.size > 1:
        ranks.all_same({"number of records": len(dataset), **settings})
        ranks.same("data", _contents(dataset))


def _contents(dataset: Any) -> str:
    """Return a digest of a data set's contents, or of some records of one not in memory."""
    known = saved.identity(dataset, Key(bytes(32)))[1]
    if known is not None:
        return str(known)
    digest = hashlib.blake2b()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        for i in np.linspace(0, len(dataset) - 1, COMPARED).astype(int).tolist():
            random.seed(i)  # so that augmentation is the same on all ranks
            np.random.seed(i)  # noqa: NPY002
            torch.manual_seed(i)  # noqa: TID251
            _feed(dataset[i], digest)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
    return digest.hexdigest()


def _feed(value: Any, digest: Any) -> None:
    """Feed a record to a digest: arrays, numbers and text, in any containers or objects.

    Raises:
        RootnoiseError: it holds something else, which cannot be compared.
    """
    match value:
        case torch.Tensor():
            digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(content.numpy().tobytes())
        case np.ndarray() if value.dtype == object:
            _feed(value.tolist(), digest)
        case np.ndarray():
            digest.update(f"{value.dtype} {value.shape} ".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        case Mapping():
            _feed([(str(name), value[name]) for name in sorted(value, key=str)], digest)
        case list() | tuple():
            for part in value:
                _feed(part, digest)
        case str() | bytes() | int() | float() | complex() | np.generic() | None:
            digest.update(f"{value!r} ".encode())
        case _:
            _feed(_parts(value), digest)


def _parts(value: Any) -> Any:
    """Return what an object holds: an image's array, or its attributes by name."""
    if hasattr(value, "__array__"):
        return np.asarray(value)
    if getattr(value, "__dict__", None):
        return vars(value)
    kind = type(value).__name__
    rule = "data must give records of arrays, numbers and text, which ranks can compare"
    raise RootnoiseError(f"{rule}, got {kind}")
