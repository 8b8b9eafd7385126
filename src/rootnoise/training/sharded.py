"""Parameters that `fully_shard` (FSDP2) has split into shards, one per rank.

Per-sample gradients of a whole sharded model do not fit into memory, and clipping needs their joint
norms before any of them is scaled. So backward keeps each layer's inputs and output gradients, and
per-sample gradients are computed from them one layer at a time, twice: for the norms, and for the
clipped sum (Bu et al., 2023, "Differentially private optimization on large model at small cost",
which saves the second backward pass of ghost clipping). The gradients that are clipped are exactly
those that were measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from opacus import GradSampleModule
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Shard

from rootnoise._check import RootnoiseError
from rootnoise.training.clipping import Clip, clip_scale, row_norms, scaled_sum
from rootnoise.training.place import own_name
from rootnoise.training.ranks import Ranks, reached


class ShardedGradSampleModule(GradSampleModule):  # type: ignore[misc]
    """Opacus's wrapper for a sharded model: backward keeps what per-sample gradients need.

    Raises:
        RootnoiseError: a trainable layer that Opacus has no per-sample gradient for, or one that
            owns a parameter of another layer.
    """

    hooks_enabled: bool

    def __init__(self, model: nn.Module, loss_reduction: str) -> None:
        super().__init__(model, batch_first=True, loss_reduction=loss_reduction, strict=False)
        self.kept: dict[nn.Module, list[tuple[list[torch.Tensor], torch.Tensor]]] = {}
        owners: dict[nn.Parameter, nn.Module] = {}
        for layer in self.iterate_submodules(model):
            kind = self._get_module_type(layer)
            if kind not in self.GRAD_SAMPLERS:
                rule = "layers of a sharded model must have a per-sample gradient in Opacus"
                raise RootnoiseError(f"{rule}, got {kind.__name__}")
            for p in layer.parameters(recurse=False):
                if owners.setdefault(p, layer) is not layer:
                    rule = "parameters of a sharded model must be in one layer each"
                    raise RootnoiseError(f"{rule}, got a second {kind.__name__} with them")

    def _get_module_type(self, module: nn.Module) -> type:
        """Return the original class, which `fully_shard` has replaced with a subclass."""
        kind = type(module)
        return kind.__bases__[1] if isinstance(module, FSDPModule) else kind

    def capture_activations_hook(
        self, module: nn.Module, forward_input: list[torch.Tensor], _: torch.Tensor
    ) -> None:
        """Keep a layer's inputs."""
        if module.training and torch.is_grad_enabled() and self.hooks_enabled:
            kept: Any = module
            if not hasattr(module, "activations"):
                kept.activations = []
            kept.activations.append([t.detach() for t in forward_input])

    def capture_backprops_hook(
        self,
        module: nn.Module,
        _: torch.Tensor,
        forward_output: torch.Tensor,
        loss_reduction: str,
        batch_first: bool,
    ) -> None:
        """Keep the gradient of a layer's output, with its inputs."""
        if self.hooks_enabled:
            inputs, backprops = self.rearrange_grad_samples(
                module=module,
                backprops=forward_output[0].detach(),
                loss_reduction=loss_reduction,
                batch_first=batch_first,
            )
            self.kept.setdefault(module, []).append((inputs, backprops))
            del module.max_batch_len

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients and what backward has kept."""
        self.discard()
        super().zero_grad(set_to_none)

    def discard(self) -> None:
        """Drop what was kept for passes that are not used."""
        self.kept.clear()
        for layer in self.modules():
            for name in ("activations", "max_batch_len"):
                vars(layer).pop(name, None)
        for p in self.parameters():
            p.grad_sample, p._forward_counter = None, 0
            vars(p).pop("_current_grad_sample", None)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run the model without keeping anything from its passes."""
        before, self.hooks_enabled = self.hooks_enabled, False
        try:
            yield
        finally:
            self.hooks_enabled = before

    @property
    def running_again(self) -> bool:
        """Whether this module is running a layer again for its gradients: it never does."""
        return False

    @property
    def left(self) -> list[torch.Tensor]:
        """What backward has left, from which per-sample gradients are computed."""
        calls = (call for calls in self.kept.values() for call in calls)
        return [t for inputs, g in calls for t in (*inputs, g)]

    def gradients(self, layer: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
        """Return the per-sample gradients of one layer's parameters, float32 (rows, size)."""
        ((inputs, backprops),) = self.kept[layer]
        made = self.GRAD_SAMPLERS[self._get_module_type(layer)](layer, inputs, backprops)
        return {p: g.flatten(1).float() for p, g in made.items() if p.requires_grad}


class Shards:
    """Parameters whose rows are spread over the ranks; each rank draws the noise of its shards.

    It adds that noise to its part of the sum.

    Attributes:
        ranks: the ranks of the mesh that the model is sharded over.
        spans: this rank's shards, in the flattened parameters.

    Raises:
        RootnoiseError: a trainable parameter that is not sharded, or not by rows over one mesh of
            one dimension.
    """

    whole = False

    def __init__(self, module: ShardedGradSampleModule, clip: Clip) -> None:
        self._module, self._clip = module, clip
        self._parameters: dict[str, DTensor] = {}
        self.spans, start = [], 0
        for name, p in module.named_parameters():
            if not p.requires_grad:
                continue
            data = _by_rows(name, p)
            first = self._parameters.setdefault(name, data)
            rows, width = _rows(data), data.numel() // data.shape[0]
            self.spans.append((start + rows.start * width, start + rows.stop * width))
            start += data.numel()
        self._sizes = [stop - start for start, stop in self.spans]
        self._mesh = first.device_mesh
        self.ranks = Ranks(self._mesh.get_group())

    def begin(self) -> None:
        """Leave the weights alone: each rank has its own part of them."""

    def clear(self) -> None:
        """Drop gradients, but keep what a forward has saved for its backward."""
        for p in self._module.parameters():
            p.grad = None

    def check(self, rows: int) -> None:
        """Refuse gradients that do not come from one backward of `rows` examples."""
        for parameter in self._parameters:
            name = own_name(parameter)
            layer = self._module.get_submodule(parameter.rpartition(".")[0])
            kept = self._module.kept.get(layer, [])
            if len(kept) > 1:
                raise RootnoiseError(f"backward must run once a step, got {len(kept)} for {name}")
            if rows and not kept:
                raise RootnoiseError(
                    f"gradients of {name} are missing: run forward and backward once, in training "
                    "mode, through all trainable parameters (evaluate under no_grad)"
                )
            found = len(kept[0][1]) if kept else 0
            if found != rows:
                raise RootnoiseError(f"indices must be one a gradient row ({found}), got {rows}")

    def check_parts(self) -> None:
        """Refuse them: each layer is gathered once, for the sum of the whole step."""
        raise RootnoiseError(
            "micro-batches must be of a model that each process holds whole, got a sharded one"
        )

    def take(self, rows: int) -> None:
        """See `check_parts`: never asked for."""
        raise NotImplementedError

    def noised_sum(self, rows: int, noise: torch.Tensor, t: int) -> tuple[torch.Tensor, int]:
        """Return this rank's part of clipped sum plus noise, and the number of bad rows."""
        clip = self._clip
        layers, bad, sums = list(self._module.kept) if rows else [], 0, {}
        if rows:
            norms = [row_norms(list(self._module.gradients(x).values())) for x in layers]
            scale, bad = clip_scale(torch.stack(norms).square().sum(0).sqrt(), clip, t)
        for layer in layers:
            for p, g in self._module.gradients(layer).items():
                sums[p] = scaled_sum(scale, g, bad)
        total = torch.cat([self._scatter(p, sums.pop(p, None)) for p in self._trainable()])
        return clip.noised(total, noise) * clip.grid, bad

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self._module.parameters() if p.requires_grad]

    def _scatter(self, p: nn.Parameter, own: torch.Tensor | None) -> torch.Tensor:
        """Return this rank's rows of the sum of all ranks' tensors, flattened."""
        whole = torch.zeros(p.numel(), dtype=torch.float64, device=p.device) if own is None else own
        shared = DTensor.from_local(whole.view(p.shape), self._mesh, [Partial()])
        with reached():
            return shared.redistribute(placements=[Shard(0)]).to_local().flatten()

    def write(self, mean: torch.Tensor) -> None:
        """Make `mean` the gradient of this rank's shards, and drop what backward has kept."""
        parts = torch.split(mean, self._sizes)
        for p, part in zip(self._trainable(), parts, strict=True):
            local = part.view(p.to_local().shape).to(p.dtype)  # type: ignore[attr-defined]
            p.grad = self._sharded(local, p.shape, 0)
        self._module.kept.clear()

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
    if not isinstance(p.data, DTensor) or tuple(p.data.placements) != (Shard(0),):
        got = p.data.placements if isinstance(p.data, DTensor) else type(p.data).__name__
        rule = "must be sharded by rows over one mesh dimension"
        raise RootnoiseError(f"{own_name(name)} {rule}, got {got}")
    return p.data


def _rows(p: DTensor) -> range:
    """Return this rank's rows: ranks take ceil(rows / size) each, in order, until none is left."""
    rank, size = p.device_mesh.get_local_rank(), p.device_mesh.size()
    most = -(-p.shape[0] // size)
    rows = range(min(rank * most, p.shape[0]), min((rank + 1) * most, p.shape[0]))
    if len(rows) != len(p.to_local()):
        raise RootnoiseError(f"shard must hold rows {rows}, got {len(p.to_local())} rows")
    return rows
