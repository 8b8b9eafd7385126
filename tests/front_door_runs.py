"""What the ranks of test_front_door_ranks run; a child can import it, a test module it cannot."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, TensorDataset, random_split

from parallel_runs import Refusals, examples, flat, join, network
from rootnoise.front_door import Private, evaluate, make_private
from rootnoise.keys import Key
from rootnoise.training.whole import whole
from sharded_runs import sharded

SETTINGS: dict[str, Any] = {
    "noise_multiplier": 0.3,
    "delta": 1e-5,
    "epochs": 3,
    "batch_size": 6,
    "mechanism": "bsr",
}


def data() -> TensorDataset:
    return TensorDataset(*examples())


def parts(kind: str, size: int, seed: int = 1) -> tuple[nn.Module, torch.optim.Optimizer]:
    model: nn.Module = network(seed)
    if kind == "fsdp":
        model = sharded(model, size)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def private(kind: str, size: int, rank: int = 0, **more: Any) -> Private:
    """Key and seed of ranks other than 0 do not count."""
    secrets = {} if "resume" in more else {"key": Key.from_seed(3 + rank)}
    return make_private(
        *parts(kind, size), data(), **SETTINGS | {"seed": 4 + rank} | secrets | more
    )


def loop(made: Private, until: int) -> None:
    """The loop of one process, unchanged."""
    model, optimizer, loader = made
    while optimizer.t < until:
        for x, y in loader:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            if optimizer.t == until:
                break


def report(made: Private, rank: int, out: Path) -> None:
    saved = {"weights": whole(made.model.state_dict()), "accuracy": evaluate(made.model, data())}
    torch.save(saved, out / f"{rank}.pt")


def run(rank: int, size: int, out: Path, kind: str, more: dict[str, Any]) -> None:
    join(rank, size, out)
    made = private(kind, size, rank, **more)
    loop(made, 12)
    report(made, rank, out)


def begin(rank: int, size: int, out: Path, kind: str) -> None:
    """Make 5 steps and save."""
    join(rank, size, out)
    made = private(kind, size, rank)
    loop(made, 5)
    made.optimizer.save(out / "saved.pt" if rank == 0 else out / "of another rank.pt")


class Augmented(Dataset[Any]):
    """Noise in each record, drawn anew each time."""

    def __init__(self, shift: float = 0.0) -> None:
        self.shift = shift

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> Any:
        x = torch.randn(7) + i + self.shift
        return x.numpy(), {"x": x, "y": [i % 3, str(i), b"", None, 0.5]}, _Image()


class _Image:
    def __array__(self, *_: Any, **__: Any) -> Any:
        return torch.ones(2).numpy()


def refuse(rank: int, size: int, out: Path) -> None:
    """Note what is refused, in order."""
    join(rank, size, out)
    refused = Refusals()

    torch.manual_seed(rank)  # noqa: TID251 - what users forget
    half = random_split(data(), [12, 12])[0]
    refused(partial(make_private, *parts("", 2), half, **SETTINGS))
    refused(partial(make_private, *parts("", 2), Augmented(rank), **SETTINGS))
    plain, before = parts("", 2), torch.get_rng_state()
    make_private(*plain, Augmented(), **SETTINGS | {"independence": "assumed"})
    assert torch.equal(torch.get_rng_state(), before)
    refused(partial(private, "", 2, rank, clip_norm=1.0 + rank))
    refused(partial(private, "", 2, rank, resume=out / "none.pt"))
    made = private("", 2, rank)
    loop(made, 2)
    refused((lambda: made.optimizer.save(out / "x.pt")) if rank == 0 else partial(loop, made, 3))
    made.optimizer.zero_grad()
    refused(lambda: made.optimizer.save(out / "none" / "x.pt"))
    loop(made, 4)  # all of this has changed nothing
    (out / f"{rank}.txt").write_text("\n".join(refused))
    dist.destroy_process_group()
    os.environ["WORLD_SIZE"] = "2"
    refused(partial(private, "", 2, rank))
    assert refused[-1].startswith("processes of a run must meet before make_private (torch.")


def weights(path: Path) -> Any:
    return flat(torch.load(path, weights_only=True)["weights"])
