"""Parameters that `fully_shard` (FSDP2) has split into shards, one per rank.

Backward leaves each layer's inputs and output gradients, as for whole models (`training.clip`).
From them a rank makes norms over all layers and then, layer after layer, its clipped sum. That is
rounded to the grid, scattered over the ranks, which add up exactly, and freed before the next: what
a rank holds beside its shards is one layer. FSDP2's own reduction has nothing to do, since
parameters take no part in autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from rootnoise._check import RootnoiseError
from rootnoise.training.clip import PrivateModule
from rootnoise.training.clip.bounds import Sum
from rootnoise.training.clip.taps import guard_parameter, kind_of
from rootnoise.training.clipping import Clip, warn_non_finite
from rootnoise.training.place import own_name
from rootnoise.training.ranks import KEPT, SENT, Ranks
from rootnoise.training.replicated import rule_within, widest


class ShardedModule(PrivateModule):
    """A `PrivateModule` whose layers FSDP2 gathers for forward and backward.

    `add` gives away the clipped sum of each layer as soon as it is whole, and does not keep it.

    Attributes:
        send: takes a parameter's float64 sum, flattened and followed by zeros so that all ranks get
            as many rows; called for each parameter in the same order on every rank, examples or
            none.
        sends: whether `add` calls it; otherwise sums are kept whole until the next `add`.
    """

    send: Callable[[nn.Parameter, torch.Tensor], None]

    def __init__(self, module: nn.Module, loss_reduction: str) -> None:
        super().__init__(module, loss_reduction, guarded=True)
        self.sends = True
        self._padded: dict[nn.Parameter, torch.Tensor] = {}
        self._own: dict[nn.Parameter, Sum] = {}
        self._parts = [m for m in module.modules() if isinstance(m, FSDPModule)]
        named = list(module.named_parameters(remove_duplicate=False))
        self._names = {name for name, p in named if p in self._groups}
        part: Any
        for name, part in module.named_modules():
            if part in self._parts:
                part.register_forward_hook(partial(self._meet, name), prepend=True)
        for tapped in self._falls:  # run again, it would have to gather them on all ranks at once
            parts = [m for m in tapped.module.modules() if m is not tapped.module]
            cut = [kind_of(part).__name__ for part in parts if isinstance(part, FSDPModule)]
            if cut:
                kind = kind_of(tapped.module).__name__
                rule = f"layer {tapped.name} ({kind}) must be sharded as one, without its parts"
                raise RootnoiseError(f"{rule}, got a {cut[0]} sharded by itself")

    @property
    def reduces(self) -> bool:
        """Whether sums are to be exchanged now: torch's `set_requires_gradient_sync`."""
        states = [part._get_fsdp_state() for part in self._parts]
        groups = [getattr(s, "_fsdp_param_groups", None) or [s._fsdp_param_group] for s in states]
        return all(group.reduce_grads for each in groups for group in each if group is not None)

    def reshard(self) -> None:
        """Free the parameters that a forward without backward has left gathered."""
        for part in self._parts:
            part.reshard()

    def sent(self) -> int:
        """Return how many examples were bad since the last call; their sums have been sent."""
        bad = self._bad
        self.restart()
        return bad

    def restart(self) -> None:
        """Drop the sums that were kept."""
        super().restart()
        self._padded, self._own = {}, {}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_padded": {}, "_own": {}}

    def _meet(self, prefix: str, part: nn.Module, args: Any, output: Any) -> None:
        """Guard the gathered parameters, which are there until this part's forward ends."""
        book = self._book
        if book.paused:  # a layer that is run again has other tensors in their place
            return
        for name, p in part.named_parameters(prefix, remove_duplicate=False):
            if name not in self._names or p in self._groups or p in book.aliases:
                continue
            book.aliases[p] = name
            wanted = p.requires_grad
            p.requires_grad_(True)
            guard_parameter(book, name, p)
            p.requires_grad_(wanted)

    def _add(self, scales: torch.Tensor, bad: torch.Tensor | None) -> None:
        for group, (tapped, scale) in enumerate(zip(self._rows, scales, strict=True)):
            self._add_layer(tapped, scale, bad)
            for p in tapped.parameters.values():
                if self.sends and self._groups[p] == group:
                    self._sum_of(p).whole()
                    del self._own[p]
                    self.send(p, self._padded.pop(p))

    def _sum_of(self, p: Any) -> Sum:
        if p not in self._own:
            size = _most_rows(p) * p.device_mesh.size() * _width(p)
            padded = torch.empty(size, dtype=torch.float64, device=p.device)
            padded[p.numel() :].zero_()
            self._padded[p], self._own[p] = padded, Sum(padded[: p.numel()])
        return self._own[p]


class Shards:
    """Parameters whose rows are spread over the ranks; each rank draws the noise of its shards.

    It adds that noise to its part of the sum. One record moves the sum by at most the clip norm,
    for the reasons given at `replicated.Copies`; a micro-batch is rounded by itself, and a record
    is in one of them.

    Attributes:
        ranks: the ranks of the mesh that the model is sharded over.
        spans: this rank's shards, in the flattened parameters.

    Raises:
        RootnoiseError: a trainable parameter that is not sharded, not by rows over one mesh of
            one dimension, or not on the mesh's device; or as for `replicated.rule_within`.
    """

    whole = False

    def __init__(self, module: ShardedModule, clip: Clip) -> None:
        self._module, self._clip = module, clip
        self._parameters: dict[str, Any] = {}
        self.spans, start = [], 0
        for name, p in module.named_parameters():
            if not p.requires_grad:
                continue
            data = _by_rows(name, p)
            self._parameters[name] = p
            rows, width = _rows(data), _width(data)
            self.spans.append((start + rows.start * width, start + rows.stop * width))
            start += data.numel()
        self._sizes = [stop - start for start, stop in self.spans]
        self._mesh = _by_rows(name, p).device_mesh
        self.ranks = Ranks(self._mesh.get_group())
        self._rule = rule_within(clip, start)
        self._dtype = widest(self._parameters.values())
        self._total: torch.Tensor | None = None  # this rank's rows of the sum, in grid units
        self._own: dict[nn.Parameter, torch.Tensor] = {}  # their places in it
        self._taken = 0  # examples whose gradients are in the sums
        module.send = self._scatter

    @property
    def doing(self) -> int:
        """See `Place`; ranks that differ would wait for each other, so `accumulate` compares it."""
        return SENT if self._module.reduces else KEPT

    def begin(self) -> None:
        """Leave the weights alone: each rank has its own part of them."""

    def clear(self) -> None:
        """Drop gradients and their sum, but keep what a forward has saved for its backward."""
        self._module.restart()
        self._module.zero_grad()
        for p in self._parameters.values():
            p.grad = None
        self._total, self._own, self._taken = None, {}, 0

    def check(self, rows: int) -> None:
        """Refuse gradients that do not come from one backward of `rows` examples."""
        name = own_name(next(iter(self._parameters)))
        self._module.check(rows, f"gradients of {name}")

    def take(self, rows: int) -> None:
        """Add the clipped gradients of one backward of `rows` examples to the sum of the step.

        Ranks exchange sums now, or with the last part where torch's `set_requires_gradient_sync`
        says so.
        """
        self._take(rows, self.doing == SENT)

    def _take(self, rows: int, send: bool) -> None:
        if not rows:
            self._module.discard()  # no backward, or that of an empty part
        self._module.sends = send
        self._module.norms(rows)
        self._module.add(self._rule)
        self._taken += rows

    def _scatter(self, p: nn.Parameter, total: torch.Tensor) -> None:
        """Add this rank's rows of the sum of all ranks' tensors."""
        total.round_()
        own = self.ranks.part_of_sum(total)
        if self._total is None:
            self._total = torch.zeros(sum(self._sizes), dtype=torch.float64, device=own.device)
            parts = torch.split(self._total, self._sizes)
            self._own = dict(zip(self._parameters.values(), parts, strict=True))
        self._own[p].add_(own[: len(self._own[p])])

    def noised_mean(
        self, rows: int, noise: torch.Tensor, t: int, by: float
    ) -> tuple[torch.Tensor, int]:
        """Return this rank's part of the noised mean, and the number of bad rows.

        Includes what `take` has added.
        """
        self._take(rows, True)
        bad = self._module.sent()
        rows, self._taken = self._taken, 0
        if bad:
            warn_non_finite(bad, rows, t)
        total, self._total, self._own = self._total, None, {}
        assert total is not None  # noqa: S101 - `_scatter` has made it
        self._module.reshard()  # the probe's forward has left the root's parameters gathered
        mean = noise.to(total.device, self._dtype)
        self._clip.mean_(mean, total, mean, by)
        return mean, bad

    def write(self, mean: torch.Tensor) -> None:
        """Make `mean` the gradient of this rank's shards."""
        parts = torch.split(mean, self._sizes)
        for p, part in zip(self._parameters.values(), parts, strict=True):
            local = part.view(p.to_local().shape).to(p.dtype)
            p.grad = self._sharded(local, p.shape, 0)

    def save(self, rows: torch.Tensor, most: int) -> dict[str, DTensor]:
        """Return the noise rows of each parameter as a DTensor of shape (most, *its shape).

        The shape does not depend on the step, so that `torch.distributed.checkpoint` can fill it.
        """
        padded = rows.new_zeros(most, rows.shape[1])
        padded[: len(rows)] = rows
        saved = {}
        parts = torch.split(padded, self._sizes, 1)
        for (name, p), part in zip(self._parameters.items(), parts, strict=True):
            local = part.reshape(most, *p.to_local().shape).to(p.device)
            saved[name] = self._sharded(local, torch.Size([most, *p.shape]), 1)
        return saved

    def load(self, name: str, saved: Any, n_rows: int) -> torch.Tensor:
        """Return this rank's columns of saved rows, or refuse another layout."""
        columns = []
        for parameter, p in self._parameters.items():
            rows = saved.get(parameter) if isinstance(saved, Mapping) else None
            if not isinstance(rows, DTensor) or rows.shape[1:] != p.shape or len(rows) < n_rows:
                got = f"{type(rows).__name__} of shape {tuple(getattr(rows, 'shape', ()))}"
                rule = f"a DTensor of at least {n_rows} rows for {own_name(parameter)}"
                raise RootnoiseError(f"saved noise's {name} must have {rule}, got {got}")
            local = rows.redistribute(self._mesh, [Shard(1)]).to_local()
            columns.append(local[:n_rows].flatten(1))
        return torch.cat(columns, 1).cpu()

    def _sharded(self, local: torch.Tensor, shape: torch.Size, dim: int) -> DTensor:
        stride = torch.empty(shape, device="meta").stride()
        placements = [Shard(dim)]
        return DTensor.from_local(local, self._mesh, placements, shape=shape, stride=stride)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the inner optimizer's state by parameter name, so that it can be resharded."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return dict(get_optimizer_state_dict(self._module._module, optimizer))

    def load_optimizer_state(
        self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
    ) -> None:
        """Restore the state of the inner optimizer: by name, or by number (`training.whole`)."""
        if all(isinstance(p, int) for group in state["param_groups"] for p in group["params"]):
            optimizer.load_state_dict(dict(state))
            return
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        set_optimizer_state_dict(self._module._module, optimizer, dict(state))


def _by_rows(name: str, p: nn.Parameter) -> DTensor:
    """Return the parameter if its rows are spread over a mesh of one dimension, or refuse it."""
    data, name = p.data, own_name(name)
    if not isinstance(data, DTensor) or tuple(data.placements) != (Shard(0),):
        got = data.placements if isinstance(data, DTensor) else type(data).__name__
        raise RootnoiseError(f"{name} must be sharded by rows over one mesh dimension, got {got}")
    if data.device.type != data.device_mesh.device_type:
        rule = f"on the mesh's device ({data.device_mesh.device_type}, no CPU offload)"
        raise RootnoiseError(f"{name} must be {rule}, got {data.device.type}")
    return data


def _rows(p: DTensor) -> range:
    """Return this rank's rows: ranks take ceil(rows / size) each, in order, until none is left."""
    rank, most = p.device_mesh.get_local_rank(), _most_rows(p)
    rows = range(min(rank * most, p.shape[0]), min((rank + 1) * most, p.shape[0]))
    if len(rows) != len(p.to_local()):
        raise RootnoiseError(f"shard must hold rows {rows}, got {len(p.to_local())} rows")
    return rows


def _most_rows(p: Any) -> int:
    return int(-(-p.shape[0] // p.device_mesh.size()))


def _width(p: torch.Tensor) -> int:
    return p.numel() // max(1, p.shape[0])
