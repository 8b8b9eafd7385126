"""The ranks of one run: what they must agree on, and what they exchange.

Every rank takes a part of each batch. A step communicates the indices, a few bytes per example, and
one sum of the size of the model. Noise needs no communication: each rank adds its own part of it
before the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from rootnoise._check import RootnoiseError

Indices = NDArray[np.int64]

# Sent in place of the step number.
REFUSED, SAVING = -1, -2
# What a rank does next, sent beside it; a sharded model's sums are exchanged by all ranks, or none.
STEP, SENT, KEPT = range(3)
DOING = ("step", "accumulate", "accumulate without set_requires_gradient_sync")


class PeerError(RootnoiseError):
    """Another rank has refused; the reason is that rank's."""


class LostError(PeerError):
    """Another rank cannot be reached: it has ended, or hangs."""


@contextmanager
def reached() -> Iterator[None]:
    """Say in one line that another rank cannot be reached."""
    try:
        yield
    except RuntimeError as reason:
        if not unreached(reason):
            raise
        line = str(reason).partition("\n")[0].rpartition("] ")[2]
        raise LostError(
            f"ranks must all go on to the end, got one that has ended or hangs: {line:.120}"
        ) from None


def unreached(reason: BaseException) -> bool:
    """Whether torch says that another process cannot be reached; gloo has no class for it."""
    backends = isinstance(reason, RuntimeError) and ("gloo" in str(reason) or "NCCL" in str(reason))
    return backends or isinstance(reason, dist.DistError)


class Ranks:
    """The ranks of a torch process group, or one process alone.

    Each method that exchanges something raises `LostError` where another rank has ended.

    Attributes:
        group: the process group; None for one process alone.
        rank: this process's rank, in [0, size).
        size: number of ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        nccl = group is not None and dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu"

    def span(self, n: int) -> tuple[int, int]:
        """Return this rank's part of n positions: near-equal parts, in rank order."""
        return self._span(self.rank, n)

    def first(self, value: Any) -> Any:
        """Return rank 0's picklable value."""
        values = [value]
        if self.group is not None:
            with reached():
                dist.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]

    def by_first(self, make: Callable[[], Any]) -> Any:
        """Return what rank 0 makes, or raise its refusal on every rank."""
        if self.size == 1:
            return make()
        made, refusal = None, None
        if self.rank == 0:
            try:
                made = make()
            except RootnoiseError as reason:
                refusal = reason
        made, line = self.first((made, None if refusal is None else str(refusal)))
        if refusal is not None:
            raise refusal
        if line is not None:
            raise PeerError(line)
        return made

    def same(self, name: str, value: Any) -> None:
        """Raise on every rank unless all have the same value as rank 0."""
        self.all_same({name: value})

    def all_same(self, values: Mapping[str, Any]) -> None:
        """Raise on every rank unless all have the same values as rank 0, by name."""
        if self.size == 1:
            return
        theirs = self.first(dict(values))
        names = list(theirs)
        # As text, in which NaN equals itself.
        other = [i for i, n in enumerate(names) if repr(values.get(n)) != repr(theirs[n])]
        found = self._gather(np.array([*other, len(names)][:1], dtype=np.int64))
        first = min(int(each[0]) for each in found)
        if first < len(names):
            others = [rank for rank, each in enumerate(found) if each[0] == first]
            rule = f"{names[first]} must be rank 0's on all ranks"
            raise RootnoiseError(f"{rule}, got others on {others}")

    def copy_first_(self, tensors: list[torch.Tensor]) -> None:
        """Overwrite the tensors with those of rank 0."""
        if self.group is not None:
            with reached():
                for tensor in tensors:
                    dist.broadcast(tensor, group=self.group, group_src=0)

    def add_(self, tensor: torch.Tensor) -> None:
        """Replace the tensor by its sum over the ranks."""
        if self.group is not None:
            with reached():
                dist.all_reduce(tensor, group=self.group)

    def part_of_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of the tensor's sum over the ranks, all parts being as long."""
        own = tensor.new_empty(len(tensor) // self.size)
        # torch 2.13 renames it.
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        with reached():
            scatter(own, tensor, group=self.group)
        return own

    def batch(self, t: int, part: Indices) -> Indices:
        """Return the batch of step t, joined from every rank's part, unless a rank refuses.

        Raises:
            RootnoiseError: as for `agree`.
        """
        self.agree(t)
        return np.concatenate(self._gather(part))

    def agree(self, t: int, doing: int = STEP) -> None:
        """Wait until every rank is here, at step t or `SAVING`, to do the same of `DOING`.

        Raises:
            RootnoiseError: on every rank, if one calls `refuse` instead, is at another step, or
                does something else there.
        """
        steps, done = self._steps(t, doing)
        if REFUSED in steps:
            raise PeerError(f"step {t} was refused by rank {steps.index(REFUSED)}")
        if SAVING in steps and len(set(steps)) > 1:
            saving = [rank for rank, step in enumerate(steps) if step == SAVING]
            raise RootnoiseError(f"save must be called on every rank, got it on {saving}")
        if len(set(steps)) > 1:
            raise RootnoiseError(f"ranks must be at one step, got {steps}")
        if len(set(done)) > 1:
            rule = f"ranks must do the same in step {t}, part for part"
            raise RootnoiseError(f"{rule}, got {', '.join(DOING[each] for each in done)}")

    def refuse(self, refusal: RootnoiseError) -> NoReturn:
        """Raise `refusal` here, and make `agree` raise on the ranks that wait in it."""
        self._steps(REFUSED)
        raise refusal

    def _steps(self, t: int, doing: int = STEP) -> tuple[list[int], list[int]]:
        if self.group is None:
            return [t], [doing]
        steps, done = torch.stack(self._all_gather(torch.tensor([t, doing]))).T.tolist()
        return steps, done

    def columns(self, part: torch.Tensor, n: int) -> torch.Tensor:
        """Return the (rows, n) matrix whose columns `span` the ranks hold."""
        if self.group is None:
            return part
        width = -(-n // self.size)
        padded = torch.zeros(len(part), width, dtype=part.dtype, device=self._device)
        padded[:, : part.shape[1]] = part
        found = [torch.empty_like(padded) for _ in range(self.size)]
        with reached():
            dist.all_gather(found, padded, group=self.group)
        sizes = [stop - start for start, stop in (self._span(r, n) for r in range(self.size))]
        return torch.cat([f[:, :s] for f, s in zip(found, sizes, strict=True)], 1).cpu()

    def _span(self, rank: int, n: int) -> tuple[int, int]:
        return n * rank // self.size, n * (rank + 1) // self.size

    def _gather(self, part: Indices) -> list[Indices]:
        """Return every rank's integers, in rank order."""
        if self.group is None:
            return [part]
        sizes = self._all_gather(torch.tensor([part.size]))
        most = int(max(sizes))
        padded = np.zeros(most, dtype=np.int64)
        padded[: part.size] = part
        found = self._all_gather(torch.from_numpy(padded))
        return [f.numpy()[: int(s)] for f, s in zip(found, sizes, strict=True)]

    def _all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        mine = tensor.to(self._device)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with reached():
            dist.all_gather(found, mine, group=self.group)
        return [f.cpu() for f in found]
