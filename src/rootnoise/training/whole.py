"""The state of a run as one process would save it, whatever its ranks hold of it.

So a run goes on with any number of ranks, each with a copy or with shards. Every function but
`load_weights` exchanges shards: call it on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._pytree import tree_map

from rootnoise._check import RootnoiseError, integer
from rootnoise.training.optimizer import PrivateOptimizer
from rootnoise.training.ranks import reached
from rootnoise.training.resume import rows
from rootnoise.training.sharded import ShardedModule


def whole(value: Any) -> Any:
    """Return containers of tensors with all shards put together, on the CPU."""

    def joined(x: Any) -> Any:
        return x.full_tensor().detach().cpu() if isinstance(x, DTensor) else x

    with reached():
        return tree_map(joined, value)


def load_weights(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Load whole weights into a model that may be sharded; raises what torch does."""
    places = model.state_dict()
    model.load_state_dict({n: like(w, places.get(n)) for n, w in weights.items()})


def state_dict(private: PrivateOptimizer) -> dict[str, Any]:
    """Return `private.state_dict()` as one process would save it, the same on each rank.

    `non_finite` is the number of all ranks.
    """
    total = torch.tensor([private.non_finite])
    private._ranks.add_(total)
    state = private.state_dict() | {"non_finite": int(total)}
    if not isinstance(private.module, ShardedModule):
        return state
    noise = state["noise"]
    n_rows = {"state": rows(private)["state"], "ready": noise["made"] - noise["t"]}
    for name, n in n_rows.items():
        columns = [t[:n].flatten(1) for t in whole(list(noise[name].values()))]
        noise[name] = torch.cat(columns, 1)
    return state | {"optimizer": whole(private.optimizer.state_dict())}


def load_state_dict(private: PrivateOptimizer, state: Mapping[str, Any]) -> None:
    """Continue the run of a whole state.

    Raises:
        RootnoiseError: what `PrivateOptimizer.load_state_dict` refuses.
    """
    if private._ranks.rank:
        integer("saved non_finite", state.get("non_finite", -1), 0)
        state = dict(state) | {"non_finite": 0}
    if isinstance(private.module, ShardedModule):
        try:
            state = dict(state) | _cut(private, state)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as reason:
            line = " ".join(str(reason).split())
            raise RootnoiseError(f"saved state must be a whole one, got {line:.120}") from None
    private.load_state_dict(state)


def _cut(private: PrivateOptimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return noise and inner state in the shards of this rank."""
    trainable: dict[str, Any] = {
        name: p for name, p in private.module.named_parameters() if p.requires_grad
    }
    noise = dict(state["noise"])
    for name in rows(private):
        columns = torch.split(noise[name], [p.numel() for p in trainable.values()], 1)
        noise[name] = {
            n: distribute_tensor(
                part.reshape(len(part), *p.shape), p.device_mesh, [Shard(1)], src_data_rank=None
            )
            for (n, p), part in zip(trainable.items(), columns, strict=True)
        }
    return {"noise": noise, "optimizer": cut(state["optimizer"], private.optimizer)}


def cut(inner: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a whole state of a torch optimizer in the shards of its parameters."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    own = {i: {n: like(x, held[i]) for n, x in each.items()} for i, each in inner["state"].items()}
    return dict(inner) | {"state": own}


def like(value: Any, place: Any) -> Any:
    """Return a whole tensor in shards, where what it belongs to is a sharded one of its shape."""
    if not isinstance(place, DTensor) or getattr(value, "shape", None) != place.shape:
        return value
    return distribute_tensor(
        value.to(place.device), place.device_mesh, place.placements, src_data_rank=None
    )
