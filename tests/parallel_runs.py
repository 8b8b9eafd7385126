"""What the ranks of test_training_parallel run; a child can import it, a test module it cannot."""

from __future__ import annotations

import contextlib
import os
import runpy
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

from rootnoise._check import RootnoiseError
from rootnoise.factorization import factorize
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.participation.samplers import (
    CyclicPoissonSampler,
    FixedCycleSampler,
    OwnBatches,
    Sampler,
)
from rootnoise.training import PrivateOptimizer, privatize
from rootnoise.training.ranks import Ranks
from rootnoise.workload import SGD

N, BATCH, EPOCHS = 24, 6, 3
N_STEPS = 12


def join(rank: int, size: int, out: Path) -> dist.ProcessGroup:
    """Join the group whose ranks meet in a file of `out`."""
    store = f"file://{out}/store-{size}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=40)
    )
    assert dist.group.WORLD is not None
    return dist.group.WORLD


class Refusals(list[str]):
    """The lines with which actions were refused, in order; each must be."""

    def __call__(self, action: Callable[[], object]) -> None:
        try:
            action()
        except RootnoiseError as reason:
            self.append(str(reason))
        else:
            raise AssertionError(f"a refusal must follow {self}")


def examples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(N, 7, generator=generator)
    return x, torch.randint(0, 3, (N,), generator=generator)


def network(seed: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    for p in model.parameters():
        nn.init.normal_(p, std=0.5, generator=generator)
    return model


def make(group: dist.ProcessGroup | None, seed: int, poisson: bool = False) -> PrivateOptimizer:
    """Return an optimizer whose weights, batches and key come from `seed`."""
    return private(privatize(network(seed), "sum"), seed, group, poisson)


def private(
    module: Any,
    seed: int,
    group: dist.ProcessGroup | None = None,
    poisson: bool = False,
    own: bool = False,
) -> PrivateOptimizer:
    sampler: Sampler = FixedCycleSampler(N, BATCH, EPOCHS, seed=seed)
    if poisson:
        sampler = CyclicPoissonSampler(N, BATCH, 12, seed=seed)
    if own:
        sampler = OwnBatches(sampler.participation, N, BATCH, sampler.n_steps)
    workload = SGD(sampler.n_steps, 0.0 if poisson else 0.9)
    mechanism = Mechanism.calibrate(
        factorize(workload, sampler.participation, "identity" if poisson else "bsr"),
        sampler.participation,
        noise_multiplier=0.3,
        delta=1e-5,
    )
    sgd = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    key = Key.from_seed(seed)
    return PrivateOptimizer(sgd, module, mechanism, sampler, key, process_group=group)


def train(optimizer: PrivateOptimizer, rank: int, size: int, until: int) -> None:
    x, y = examples()
    for t in range(optimizer.t, until):
        part = optimizer.sampler.batch(t)[rank::size]
        backward(optimizer, x[part], y[part])
        optimizer.step(part)


def backward(optimizer: PrivateOptimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad()
    if len(x):
        cross_entropy(optimizer.module(x), y, reduction="sum").backward()


def saved(optimizer: PrivateOptimizer) -> dict[str, Any]:
    return {"weights": optimizer.module.state_dict(), "optimizer": optimizer.state_dict()}


def run(
    rank: int, size: int, out: Path, start: Path | None, until: int, poisson: bool = False
) -> None:
    """Train to step `until`, from `start` on; ranks other than 0 begin with seeds of their own."""
    group = join(rank, size, out)
    optimizer = make(group, seed=1 if start is None else 1 + rank, poisson=poisson)
    if start is not None:
        state = torch.load(start, weights_only=True)
        optimizer.module.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
    train(optimizer, rank, size, until)
    torch.save(saved(optimizer), out / f"{rank}.pt")


def run_divided(rank: int, size: int, out: Path, until: int) -> None:
    """Rank 0 takes its part in three micro-batches, rank 1 whole; at first it leaves one out."""
    optimizer = make(join(rank, size, out), seed=1)
    x, y = examples()
    for t in range(until):
        part = optimizer.sampler.batch(t)[rank::size]
        parts = np.split(part, [1, 2]) if rank == 0 else [part]
        for left_out in (True, False) if t == 0 else (False,):
            optimizer.zero_grad()
            for one in parts[int(left_out and rank == 0) : -1]:
                cross_entropy(optimizer.module(x[one]), y[one], reduction="sum").backward()
                optimizer.accumulate(one)
            last = parts[-1]
            cross_entropy(optimizer.module(x[last]), y[last], reduction="sum").backward()
            try:
                optimizer.step(last)
            except RootnoiseError as reason:
                (out / f"{rank}.txt").write_text(str(reason))
    torch.save(saved(optimizer), out / f"{rank}.pt")


def hold_gradients(rank: int, size: int, out: Path) -> None:
    """Keep a step's noised gradients, in float64, through the micro-batches of the next step."""
    optimizer = private(privatize(network(1).double(), "sum"), 1, join(rank, size, out))
    x, y = examples()
    held: list[tuple[Any, Any]] = []
    for t in range(3):
        *parts, last = np.split(optimizer.sampler.batch(t)[rank::size], [1, 2])
        for part in (*parts, last):
            cross_entropy(optimizer.module(x[part].double()), y[part], reduction="sum").backward()
            if part is last:
                optimizer.step(part)
            else:
                optimizer.accumulate(part)
            assert all(torch.equal(g, then) for g, then in held), f"changed in step {t}"
        grads = [p.grad for p in optimizer.module.parameters()]
        held += [(g, g.clone()) for g in grads if g is not None]
    assert len(held) == 12


def run_wrong(rank: int, size: int, out: Path, until: int) -> None:
    """The mistake: every rank adds all of the noise."""
    Ranks.span = lambda self, n: (0, n)  # type: ignore[method-assign]
    optimizer = make(join(rank, size, out), seed=1)
    train(optimizer, rank, size, until)
    torch.save({"weights": optimizer.module.state_dict()}, out / f"{rank}.pt")


def refuse(rank: int, size: int, out: Path) -> None:
    """Meet one refusal after the other, all on both ranks, and go on as if there were none."""
    optimizer = make(join(rank, size, out), seed=1)
    x, y = examples()
    batch = optimizer.sampler.batch(0)
    part = batch[rank::size]

    def refused(indices: Any) -> str:
        try:
            optimizer.step(indices)
        except RootnoiseError as reason:
            return str(reason)
        raise AssertionError(f"{indices} must be refused")

    lines = []
    backward(optimizer, x[part], y[part])
    lines.append(refused(part if rank else part[1:]))
    lines.append(refused(part + 0.5 if rank else part))
    lines.append(refused(batch[:3]))  # the same three on both ranks
    optimizer.t += rank
    optimizer.ledger.t += rank
    optimizer.stream.t += rank
    lines.append(refused(part))
    optimizer.t -= rank
    optimizer.ledger.t -= rank
    optimizer.stream.t -= rank
    train(optimizer, rank, size, 2)
    again = optimizer.sampler.batch(0)[rank::size]
    backward(optimizer, x[again], y[again])
    lines.append(refused(again))
    train(optimizer, rank, size, 3)
    torch.save(saved(optimizer) | {"lines": lines}, out / f"{rank}.pt")


def same_ten(rank: int, size: int, out: Path) -> None:
    """Poisson sampling, but for the ranks' joined batch: it lacks one drawn example, or has all."""
    optimizer = make(join(rank, size, out), seed=1, poisson=True)
    x, y = examples()
    t = next(t for t in range(12) if optimizer.sampler.batch(t).size > 1)
    train(optimizer, rank, size, t)
    batch = optimizer.sampler.batch(t)
    lines = []
    for wrong in (batch[1:], np.arange(batch.size)):
        part = wrong[rank::size]
        backward(optimizer, x[part], y[part])
        try:
            optimizer.step(part)
        except RootnoiseError as reason:
            lines.append(str(reason))
    part = batch[::-1][rank::size].copy()  # neither the order nor who holds what matters
    backward(optimizer, x[part], y[part])
    optimizer.step(part)
    torch.save({"lines": lines, "t": optimizer.t - t}, out / f"{rank}.pt")


def lose_file(rank: int, size: int, out: Path) -> None:
    """The file of rank 0's ledger cannot be written."""
    optimizer = make(join(rank, size, out), seed=1)
    if rank == 0:
        (out / "gone").mkdir()
        optimizer.ledger.keep(out / "gone" / "ledger.bin")
        shutil.rmtree(out / "gone")
    try:
        train(optimizer, rank, size, 1)
    except RootnoiseError as reason:
        (out / f"{rank}.txt").write_text(str(reason))


def disagree(rank: int, size: int, out: Path) -> None:
    """Rank 2 has another mechanism."""
    group = join(rank, size, out)
    try:
        make(group, seed=1, poisson=rank == 2)
    except RootnoiseError as reason:
        (out / f"{rank}.txt").write_text(str(reason))


def example(rank: int, size: int, script: str, port: int, out: Path) -> None:
    """Run a script as torchrun would."""
    where = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()}
    with (out / f"{rank}.txt").open("w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(script, run_name="__main__")


def primitives(rank: int, size: int, out: Path) -> None:
    """Span, columns and sums for lengths that do not divide by the ranks."""
    ranks = Ranks(join(rank, size, out))
    for n in (1, 3, 8, 11):
        whole = torch.arange(3.0 * n).reshape(3, n)
        start, stop = ranks.span(n)
        assert torch.equal(ranks.columns(whole[:, start:stop], n), whole)
        total = torch.zeros(n)
        total[start:stop] = 1
        ranks.add_(total)
        assert torch.equal(total, torch.ones(n))
    part = np.arange(rank) + 10 * rank
    expected = np.concatenate([np.arange(r) + 10 * r for r in range(size)])
    assert np.array_equal(ranks.batch(0, part), expected)
    assert ranks.batch(0, np.empty(0, dtype=np.int64)).size == 0


def results(out: Path, size: int) -> list[dict[str, Any]]:
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(size)]


def flat(weights: dict[str, torch.Tensor]) -> NDArray[np.float64]:
    return torch.cat([weight.flatten() for weight in weights.values()]).double().numpy()


def alone(until: int, poisson: bool = False) -> tuple[NDArray[np.float64], PrivateOptimizer]:
    """Return the first weights, flattened, and the optimizer of a run of one process."""
    optimizer = make(None, seed=1, poisson=poisson)
    first = flat(optimizer.module.state_dict())
    train(optimizer, 0, 1, until)
    return first, optimizer


def assert_close(
    found: dict[str, Any], optimizer: PrivateOptimizer, first: NDArray[np.float64]
) -> None:
    """To fp32 rounding of what the run has moved: a wrong noise is off by its own size."""
    expected = flat(optimizer.module.state_dict())
    moved = np.abs(expected - first).max()
    np.testing.assert_allclose(flat(found["weights"]), expected, atol=1e-5 * moved, rtol=0)


def two_runs(rank: int, size: int, out: Path) -> None:
    """Two runs side by side in one world: ranks 0 and 2, and ranks 1 and 3."""
    join(rank, size, out)
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    own = rank % 2
    ranks = Ranks(groups[own])
    assert (ranks.rank, ranks.size) == (rank // 2, 2)
    assert ranks.first(rank) == own
    total, first = torch.tensor([1.0, rank]), torch.tensor([float(rank)])
    ranks.add_(total)
    assert total.tolist() == [2, 2 * own + 2]
    ranks.copy_first_([first])
    assert first.tolist() == [own]
    assert ranks.batch(5, np.array([rank])).tolist() == [own, own + 2]
    part = torch.tensor([[own, own + 1.0, own + 2.0]])[:, slice(*ranks.span(3))]
    assert ranks.columns(part, 3).tolist() == [[own, own + 1, own + 2]]
