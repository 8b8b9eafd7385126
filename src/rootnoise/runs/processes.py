"""The processes of one run, as torchrun starts them: joined, and stopped together by one line.

A process that fails leaves its line in the store where all have met, and ends. The others wait for
it in an exchange, which fails when its connections close; they find the line there and end quietly.
A process that was killed leaves no line: then one of the others says so.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous

from rootnoise._check import RootnoiseError
from rootnoise.training.ranks import LostError, PeerError, Ranks, reached, unreached

# How long a process that was told of a refusal waits for its reason.
PATIENCE = timedelta(seconds=5)


class StoppedError(RootnoiseError):
    """The run has stopped, and another process has said why."""


def launched() -> bool:
    """Whether a launcher such as torchrun has started this process as one of a run's."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


@contextmanager
def joined(lost: Callable[[], str] = lambda: "") -> Iterator[Ranks]:
    """Join the processes that a launcher has started, and stop all of them when one stops.

    A process alone, without a launcher, is a run of one rank.

    Args:
        lost: what to do when a process was killed; added to the line that says so.

    Raises:
        StoppedError: another process has failed and said why.
        RootnoiseError: another process has ended and left no reason.
    """
    if not launched():
        yield Ranks()
        return
    with reached():
        store, rank, size = next(rendezvous("env://"))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    told = _Told(PrefixStore("rootnoise", store))
    try:
        yield Ranks(dist.group.WORLD)
    except BaseException as error:
        lost_one = isinstance(error, LostError) or unreached(error)
        if told.another_says(error, lost_one):
            raise StoppedError("run must go on in all processes, got an error in another") from None
        if lost_one:
            rule = "processes of a run must all go on to its end, got one that has ended or hangs"
            raise RootnoiseError(rule + lost()) from None
        raise
    dist.destroy_process_group()


class _Told:
    """What the processes of a run have told each other about its end."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def another_says(self, error: BaseException, lost: bool) -> bool:
        """Whether another process says why the run ends; else this one does."""
        store = self._store
        try:
            if isinstance(error, PeerError) and not lost:
                store.wait(["reason"], PATIENCE)
            if lost or isinstance(error, PeerError):
                if store.check(["reason"]):
                    return True
            else:
                store.set("reason", "given")
            return bool(store.add("said", 1) > 1)
        except RuntimeError:  # the store has gone, with the process that kept it
            return False


def local_device(name: str, ranks: Ranks) -> str:
    """Return the device of this process: each has a GPU of its own.

    Raises:
        RootnoiseError: one GPU for several processes.
    """
    if ranks.size == 1 or name == "cpu":
        return name
    if name != "cuda":
        rule = "device must be cpu or cuda in several processes (each takes its own GPU)"
        raise RootnoiseError(f"{rule}, got {name}")
    return f"cuda:{os.environ.get('LOCAL_RANK', ranks.rank)}"


def on_device(ranks: Ranks, device: torch.device) -> Ranks:
    """Return the same ranks, exchanging by NCCL where they train on GPUs."""
    if ranks.group is None or device.type == "cpu":
        return ranks
    torch.cuda.set_device(device)
    return Ranks(dist.new_group(backend="nccl"))


def shard(model: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Cut each layer that has parameters over the ranks.

    Raises:
        RootnoiseError: no launcher has started this process.
    """
    if ranks.group is None:
        raise RootnoiseError(
            "fsdp must be of processes that torchrun has started, got one process: torchrun "
            "--nproc-per-node N -m rootnoise train --fsdp ..."
        )
    # No layer of ours works in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    mesh = DeviceMesh.from_group(ranks.group, device.type)
    for layer in list(model.modules())[1:]:
        if [*layer.parameters(recurse=False)]:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
