"""What the ranks of test_sharded run; a child can import it, a test module it cannot."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import cross_entropy

from parallel_runs import Refusals, examples, join, network, private, train
from rootnoise.training import PrivateOptimizer, privatize
from rootnoise.training.clipping import Clip
from rootnoise.training.sharded import Shards, _rows


def sharded(model: nn.Module, size: int) -> nn.Module:
    """Cut each linear layer and the rest over the ranks."""
    mesh = init_device_mesh("cpu", (size,))
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def make(size: int, seed: int = 1, own: bool = False) -> PrivateOptimizer:
    return private(privatize(sharded(network(1), size), "sum"), seed, own=own)


def gathered(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def run(rank: int, size: int, out: Path, until: int, poisson: bool = False) -> None:
    """Train to step `until`; key and sampler seed of ranks other than 0 are overruled.

    With nothing to do a rank still takes part in forward and backward, as `fully_shard` needs.
    """
    join(rank, size, out)
    module = privatize(sharded(network(1), size), "sum")
    optimizer = private(module, seed=1 + rank, poisson=poisson)
    x, y = examples()
    for t in range(until):
        part = optimizer.sampler.batch(t)[rank::size]
        for _ in range(1 + (t == 1)):  # the first pass of two is dropped, and leaves nothing
            optimizer.zero_grad()
            cross_entropy(module(x[part]), y[part], reduction="sum").backward()
        optimizer.step(part)
    report(optimizer, rank, out)


def report(optimizer: PrivateOptimizer, rank: int, out: Path) -> None:
    """Save the weights, put together, and the widths of shards and of noise on this rank."""
    state = optimizer.stream.state_dict()["state"]
    held = sum(p.to_local().numel() for p in optimizer.module.parameters())
    weights = gathered(optimizer.module.state_dict())
    torch.save({"weights": weights, "held": held, "state": list(state.shape)}, out / f"{rank}.pt")


def noise(rank: int, size: int, out: Path) -> None:
    """Make steps without examples: the gradients are noise alone."""
    join(rank, size, out)
    optimizer = make(size, own=True)
    steps = []
    for _ in range(optimizer.mechanism.n_steps):
        optimizer.step(np.empty(0, dtype=np.int64))
        steps.append(gathered({n: p.grad for n, p in optimizer.module.named_parameters()}))
    torch.save(steps, out / f"{rank}.pt")


def begin(rank: int, size: int, out: Path, until: int) -> None:
    """Train to step `until` and save with torch.distributed.checkpoint."""
    join(rank, size, out)
    optimizer = make(size)
    train(optimizer, rank, size, until)
    state = {"model": optimizer.module.state_dict(), "private": optimizer.state_dict()}
    save(state, checkpoint_id=out / "checkpoint")


def go_on(rank: int, size: int, out: Path, start: Path, until: int) -> None:
    """Load what `begin` has saved on another number of ranks, and train on."""
    join(rank, size, out)
    optimizer = make(size)
    state = {"model": optimizer.module.state_dict(), "private": optimizer.state_dict()}
    load(state, checkpoint_id=start / "checkpoint")
    optimizer.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["private"])
    train(optimizer, rank, size, until)
    report(optimizer, rank, out)


def refuse(rank: int, size: int, out: Path) -> None:
    """Note what is refused, in order."""
    join(rank, size, out)
    refused = Refusals()

    optimizer = make(size)
    (x, y), batch = examples(), optimizer.sampler.batch(0)
    refused(lambda: optimizer.step(batch))
    cross_entropy(optimizer.module(x[batch]), y[batch], reduction="sum").backward()
    refused(lambda: optimizer.step(batch[1:]))
    cross_entropy(optimizer.module(x[batch]), y[batch], reduction="sum").backward()
    refused(lambda: optimizer.step(batch))
    state = optimizer.state_dict()
    for damaged in (None, {}, {name: torch.zeros(9) for name in state["noise"]["state"]}):
        noise = state["noise"] | {"state": damaged}
        refused(partial(optimizer.load_state_dict, state | {"noise": noise}))

    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        fully_shard(model)
        return model

    def by_columns() -> nn.Module:
        mesh = init_device_mesh("cpu", (size,))
        model = nn.Linear(4, 4, False)
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1))
        return model

    def partly() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        fully_shard(model, ignored_params={model[0].weight})
        return model

    refused(lambda: privatize(tied()))
    refused(lambda: privatize(sharded(nn.Sequential(nn.Linear(2, 2), nn.PReLU()), size)))
    refused(lambda: Shards(privatize(by_columns()), Clip.fit(1.0, 1)))
    refused(lambda: Shards(privatize(partly()), Clip.fit(1.0, 1)))
    mesh = init_device_mesh("cpu", (size,))
    three = torch.zeros(3, 2)
    wrong = DTensor.from_local(three, mesh, [Shard(0)], shape=torch.Size([5, 2]), stride=(2, 1))
    refused(lambda: _rows(wrong))
    (out / "lines.txt").write_text("\n".join(refused))


def count_bad(rank: int, size: int, out: Path) -> None:
    """One of rank 0's examples is infinite."""
    join(rank, size, out)
    optimizer = make(size)
    (x, y), batch = examples(), optimizer.sampler.batch(0)
    x[batch[0], 0] = torch.inf
    part = batch[rank::size]
    cross_entropy(optimizer.module(x[part]), y[part], reduction="sum").backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step(part)
    assert optimizer.non_finite == len(caught) == (rank == 0)
    report(optimizer, rank, out)
