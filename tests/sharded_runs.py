"""What the ranks of test_sharded run; a child can import it, a test module it cannot."""

from __future__ import annotations

import contextlib
import itertools
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import cross_entropy

from parallel_runs import N, Refusals, examples, join, network, private, train
from rootnoise.training import PrivateOptimizer, privatize
from rootnoise.training.clipping import Clip
from rootnoise.training.ranks import Ranks
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
    shards: list[Any] = list(optimizer.module.parameters())
    held = sum(p.to_local().numel() for p in shards)
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

    def by_columns() -> nn.Module:
        mesh = init_device_mesh("cpu", (size,))
        model = nn.Linear(4, 4, False)
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1))
        return model

    def partly() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        fully_shard(model, ignored_params={model[0].weight})
        return model

    def on_meta() -> nn.Module:
        with torch.device("meta"):
            return sharded(nn.Sequential(nn.Linear(4, 4)), size)

    refused(lambda: privatize(sharded(Scaled(), size)))
    refused(lambda: Shards(privatize(on_meta()), Clip.fit(1.0, 1)))
    refused(lambda: Shards(privatize(by_columns()), Clip.fit(1.0, 1)))
    refused(lambda: Shards(privatize(partly()), Clip.fit(1.0, 1)))
    mesh = init_device_mesh("cpu", (size,))
    three = torch.zeros(3, 2)
    wrong = DTensor.from_local(three, mesh, [Shard(0)], shape=torch.Size([5, 2]), stride=(2, 1))
    refused(lambda: _rows(wrong))
    (out / "lines.txt").write_text("\n".join(refused))


class Scaled(nn.Module):
    """A layer outside of the table, with another one inside."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.ones(7)), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(x * self.scale)
        return result


class Words(nn.Module):
    """An embedding whose weights the last layer shares, and layers that normalise."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = (x.abs() * 3).long().clamp(max=10)
        result: torch.Tensor = self.out(self.norm(self.embed(ids))).mean(1)[:, :3]
        return result


class Sequences(nn.Module):
    """A transformer's layer, two recurrent ones, and one of one number, which is run again."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.recurrent, self.act = nn.GRU(4, 5, batch_first=True), nn.PReLU()
        self.again = nn.LSTM(5, 5, 2, batch_first=True)
        self.out = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.again(self.recurrent(self.block(self.embed(x[..., None])))[0])[0]
        result: torch.Tensor = self.out(self.act(seen.mean(1)))
        return result


def _children(model: nn.Module, size: int) -> nn.Module:
    for layer in model.children():
        fully_shard(layer, mesh=init_device_mesh("cpu", (size,)))
    return model


def _root(model: nn.Module, size: int, **options: Any) -> nn.Module:
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)), **options)
    return model


def _each(model: nn.Module, size: int) -> nn.Module:
    return _root(_children(model, size), size, reshard_after_forward=False)


# Which model is cut how.
CUTS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, int], nn.Module]]] = {
    "whole": (Scaled, _root),
    "tied": (Words, _root),
    "children": (Sequences, _children),
    "each": (Sequences, _each),
}


def seeded(kind: Callable[[], nn.Module]) -> nn.Module:
    model, generator = kind(), torch.Generator().manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5, generator=generator)
    return model


def cut_anyhow(rank: int, size: int, out: Path, until: int) -> None:
    """Train all models of `CUTS`, and look at them between two steps."""
    join(rank, size, out)
    warnings.simplefilter("ignore")
    for name, (kind, cut) in CUTS.items():
        optimizer, sent = private(privatize(cut(seeded(kind), size), "sum"), 1), Sent()
        shards = list(optimizer.module.parameters())
        for t in range(until):
            train(optimizer, rank, size, t + 1)
            assert len(sent.sizes) == len(shards) * (t + 1)
            assert len(optimizer.module._book.aliases) == len(shards)
            with torch.no_grad():
                optimizer.module(examples()[0])
        torch.save(gathered(optimizer.module.state_dict()), out / f"{name}-{rank}.pt")
        del optimizer, shards


def narrow(rank: int, size: int, out: Path, until: int) -> None:
    """Forward and backward in bfloat16, by FSDP2's policy."""
    join(rank, size, out)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    model = network(1)
    for layer in model:
        if isinstance(layer, nn.Linear):
            _root(layer, size, mp_policy=policy)
    optimizer = private(privatize(_root(model, size, mp_policy=policy), "sum"), 1)
    seen = []
    model[2].register_forward_pre_hook(lambda layer, args: seen.append(args[0].dtype))
    train(optimizer, rank, size, until)
    assert set(seen) == {torch.bfloat16}
    report(optimizer, rank, out)


class Sent:
    """Notes what is exchanged: numbers of each call; a sum is gone when the next is sent."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.freed = True
        self._last: Callable[[], object] = lambda: None
        real = Ranks.part_of_sum

        def part_of_sum(ranks: Ranks, tensor: torch.Tensor) -> torch.Tensor:
            self.freed &= self._last() is None
            assert torch.equal(tensor, tensor.round())  # whole units of the grid
            self.sizes.append(len(tensor))
            self._last = weakref.ref(tensor)
            return real(ranks, tensor)

        setattr(Ranks, "part_of_sum", part_of_sum)  # noqa: B010


def divided(rank: int, size: int, out: Path, until: int, sync: bool) -> None:
    """Take each part in three micro-batches, some empty; at first one is left out."""
    join(rank, size, out)
    model: Any = sharded(network(1), size)
    optimizer, sent = private(privatize(model, "sum"), 1), Sent()
    x, y = examples()
    refused = Refusals()
    for t in range(until):
        part = optimizer.sampler.batch(t)[rank::size]
        *parts, end = np.split(part, [2, 2])
        for left_out in (True, False) if t == 0 else (False,):
            optimizer.zero_grad()
            model.set_requires_gradient_sync(sync)
            sent.sizes.clear()
            for one in parts:
                cross_entropy(optimizer.module(x[one]), y[one], reduction="sum").backward()
                assert all(p.grad is None for p in optimizer.module.parameters())
                optimizer.accumulate(one)
            assert len(sent.sizes) == (8 if sync else 0)
            last = end[:0] if left_out else end
            cross_entropy(optimizer.module(x[last]), y[last], reduction="sum").backward()
            if left_out:
                refused(partial(optimizer.step, last))
            else:
                optimizer.step(last)
                assert len(sent.sizes) == (12 if sync else 4)
                assert sum(sent.sizes[-4:]) >= 58
    assert sent.freed
    assert optimizer._probe is not None
    assert optimizer._probe.probed == [0, 1, 2, 4, 8]  # in first parts: last ones show nothing
    assert "must be whole" in refused[0] or rank
    report(optimizer, rank, out)


def break_off(rank: int, size: int, out: Path, until: int) -> None:
    """The first step's exchange fails midway; the step is refused until it starts anew."""
    join(rank, size, out)
    optimizer = make(size)
    (x, y), batch = examples(), optimizer.sampler.batch(0)
    left, other = np.array_split(batch[rank::size], 2)
    before = gathered(optimizer.module.state_dict())
    real, calls = Ranks.part_of_sum, []

    def fails(ranks: Ranks, tensor: torch.Tensor) -> torch.Tensor:
        calls.append(len(tensor))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(ranks, tensor)

    setattr(Ranks, "part_of_sum", fails)  # noqa: B010
    cross_entropy(optimizer.module(x[left]), y[left], reduction="sum").backward()
    with contextlib.suppress(KeyboardInterrupt):
        optimizer.accumulate(left)
    assert len(calls) == 3
    refused = Refusals()
    optimizer.zero_grad(keep_parts=True)
    cross_entropy(optimizer.module(x[other]), y[other], reduction="sum").backward()
    refused(partial(optimizer.accumulate, other))
    assert "broken off: start anew" in refused[0]
    assert all(p.grad is None for p in optimizer.module.parameters())
    after = gathered(optimizer.module.state_dict())
    assert all(torch.equal(w, after[n]) for n, w in before.items())
    for part in (left, other):
        if part is left:
            optimizer.zero_grad()
        cross_entropy(optimizer.module(x[part]), y[part], reduction="sum").backward()
        (optimizer.accumulate if part is left else optimizer.step)(part)
    train(optimizer, rank, size, until)
    report(optimizer, rank, out)


def refuse_together(rank: int, size: int, out: Path, until: int) -> None:
    """Rank 1 brings a stranger, rank 0 mixes, and weights are used outside of their layer."""
    join(rank, size, out)
    model: Any = sharded(network(1), size)
    optimizer, refused = private(privatize(model, "sum"), 1), Refusals()
    (x, y), batch = examples(), optimizer.sampler.batch(0)
    part = batch[rank::size]
    wrong = np.setdiff1d(np.arange(24), batch)[:1] if rank else part[:1]
    cross_entropy(optimizer.module(x[wrong]), y[wrong], reduction="sum").backward()
    refused(partial(optimizer.accumulate, wrong))
    optimizer.zero_grad()
    outputs = optimizer.module(x[part])
    loss = cross_entropy(outputs, y[part], reduction="sum")
    (loss if rank else loss + outputs.var(0).sum()).backward()
    refused(partial(optimizer.accumulate, part))
    optimizer.zero_grad()
    # The weights of a root stay gathered until its backward.
    lone: Any = _root(network(1), size)
    other = private(privatize(lone, "sum"), 2)
    handle = lone.register_forward_hook(lambda m, _, out: out + m[2].weight.sum(), prepend=True)
    refused(lambda: other.module(x[part]))
    handle.remove()
    other.zero_grad()
    loss = cross_entropy(other.module(x[part]), y[part], reduction="sum")
    gathered_weight = lone[0].weight
    assert not isinstance(gathered_weight, DTensor)
    (loss * (1 + gathered_weight.sum())).backward()
    for p in (gathered_weight, *other.module.parameters()):
        assert p.grad is None or not gathered({"": p.grad})[""].any()
    del loss
    optimizer.zero_grad()
    train(optimizer, rank, size, until)
    report(optimizer, rank, out)
    (out / f"{rank}.txt").write_text("\n".join(refused))


def disagree(rank: int, size: int, out: Path, until: int) -> None:
    """Ranks differ in when sums are exchanged, then in what follows the first part."""
    join(rank, size, out)
    model: Any = sharded(network(1), size)
    optimizer, refused = private(privatize(model, "sum"), 1), Refusals()
    (x, y), sent = examples(), Sent()
    first, last = np.array_split(optimizer.sampler.batch(0)[rank::size], 2)
    before = gathered(optimizer.module.state_dict())
    model.set_requires_gradient_sync(rank == 0)
    cross_entropy(optimizer.module(x[first]), y[first], reduction="sum").backward()
    refused(partial(optimizer.accumulate, first))
    model.set_requires_gradient_sync(True)
    optimizer.accumulate(first)  # nothing was taken: what backward has left is still there
    cross_entropy(optimizer.module(x[last]), y[last], reduction="sum").backward()
    refused(partial(optimizer.step if rank else optimizer.accumulate, last))
    assert len(sent.sizes) == 4  # those of the first part
    assert optimizer.t == 0
    after = gathered(optimizer.module.state_dict())
    assert all(torch.equal(w, after[n]) for n, w in before.items())
    optimizer.step(last)
    train(optimizer, rank, size, until)
    report(optimizer, rank, out)
    (out / f"{rank}.txt").write_text("\n".join(refused))


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


def one_record(rank: int, size: int, out: Path) -> None:
    """Whatever its size and part, rank 0's first example moves the sum by one clip norm at most."""
    join(rank, size, out)
    warnings.simplefilter("ignore")
    optimizer = make(size)
    place, module = optimizer._place, optimizer.module
    clip = optimizer.mechanism.clip_norm
    vars(place)["_dtype"] = torch.float64  # a mean that shows every bit of its sum
    (x, y), shards = examples(), sum(stop - start for start, stop in place.spans)

    def total(part: np.ndarray, scale: float, sync: bool) -> torch.Tensor:
        module._module.set_requires_gradient_sync(sync)
        given = x.clone()
        given[0] *= scale
        optimizer._guard.reset()  # as a step does: nothing of the one before may count again
        for one in np.split(part, [2, 2]):
            (100 * cross_entropy(module(given[one]), y[one], reduction="sum")).backward()
            assert all(p.grad is None for p in module.parameters())
            place.take(len(one))
        return place.noised_mean(0, torch.zeros(shards), 0, 1)[0]

    mine = np.arange(N)[rank::size]
    for scale, sync in itertools.product((0, 1e-20, 1, 1e10, 1e30, float("nan")), (True, False)):
        whole = total(mine, scale, sync)
        rest = total(mine[mine > 0], scale, sync)
        squares = (whole - rest).square().sum()
        assert squares.isfinite()
        dist.all_reduce(squares)
        assert float(squares) <= clip**2, scale
        assert float(squares) > 0.99 * clip**2 or scale != 1
