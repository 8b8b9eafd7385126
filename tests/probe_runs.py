"""What the ranks of test_probe run; a child can import it, a test module it cannot."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import sharded_runs
from parallel_runs import examples, join, network, private
from rootnoise._check import RootnoiseError
from rootnoise.training import PrivateOptimizer, privatize


class Mean(nn.Tanh):
    """Mixes the batch where it is told to."""

    here = False

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return super().forward(h - h.mean(0) if self.here else h)


def mix(rank: int, size: int, out: Path, sharded: bool, what: str) -> None:
    """Train with a layer or a loss that mixes on rank 1 alone; every rank must refuse."""
    group = join(rank, size, out)
    model: nn.Module = network(1)
    model[1] = Mean()  # type: ignore[operator]
    model[1].here = what == "layer" and rank == 1  # type: ignore[index]
    module = privatize(sharded_runs.sharded(model, size) if sharded else model, "sum")
    optimizer = private(module, 1, None if sharded else group)
    lines = [step(optimizer, rank, size, what == "loss" and rank == 1)]
    model[1].here = False  # type: ignore[index]
    lines.append(step(optimizer, rank, size, False))
    lines.append(optimizer.claim())
    (out / f"{rank}.txt").write_text("\n".join(lines))


def step(optimizer: PrivateOptimizer, rank: int, size: int, mixes: bool) -> str:
    x, y = examples()
    part = optimizer.sampler.batch(optimizer.t)[rank::size]
    optimizer.zero_grad()
    out = optimizer.module(x[part])
    loss = cross_entropy(out, y[part], reduction="sum")
    if mixes:
        loss = loss + out.var(0).sum()
    loss.backward()
    try:
        optimizer.step(part)
    except RootnoiseError as reason:
        return str(reason)
    return f"step {optimizer.t}"
