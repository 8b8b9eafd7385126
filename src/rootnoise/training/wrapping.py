"""A model made ready for private training, or refused: layers, mode, wrapper, and optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from opacus.grad_sample import AbstractGradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from rootnoise._check import RootnoiseError
from rootnoise.training.clip import PrivateModule
from rootnoise.training.clip.taps import is_tapped
from rootnoise.training.guards import ForwardGuard
from rootnoise.training.probe import Probe
from rootnoise.training.sharded import ShardedModule


def privatize(model: nn.Module, loss_reduction: str = "mean") -> PrivateModule:
    """Return `model` wrapped so that backward leaves what clipping needs, and no raw gradient.

    Apply `fully_shard` (FSDP2) to a model before wrapping it; see `rootnoise.training.sharded`.

    Args:
        model: in training mode, each output row a function of its own input row alone. The loss
            must be a sum or mean of one term per example, each of its own output row alone: no
            pairs within the batch, and no division by a count taken over the batch (such as its
            number of non-padding tokens). `PrivateOptimizer` probes both conditions.
        loss_reduction: how the loss reduces the batch, "mean" (torch's default) or "sum". The
            wrong value scales gradients by the batch size before they are clipped; privacy does
            not depend on it.

    Raises:
        RootnoiseError: another reduction; a model already wrapped or in evaluation mode; a layer
            that mixes examples or remembers them (BatchNorm, running statistics) or rewrites its
            weights (`max_norm`); what `PrivateModule` refuses.
    """
    if loss_reduction not in ("mean", "sum"):
        raise RootnoiseError(f"loss_reduction must be mean or sum, got {loss_reduction!r}")
    if isinstance(model, AbstractGradSampleModule) or hasattr(model, "autograd_grad_sample_hooks"):
        raise RootnoiseError(f"model must be a plain module, got {type(model).__name__} of Opacus")
    if isinstance(model, DistributedDataParallel):  # it would add up raw gradients
        rule = "model must be a plain module (PrivateOptimizer takes the process group)"
        raise RootnoiseError(f"{rule}, got DistributedDataParallel")
    if isinstance(model, PrivateModule) or is_tapped(model):
        kind = type(model).__name__
        raise RootnoiseError(f"model must be a plain module, got a private {kind}: wrap it once")
    check_layers(model)
    if any(isinstance(part, FSDPModule) for part in model.modules()):
        return ShardedModule(model, loss_reduction)
    return PrivateModule(model, loss_reduction, guarded=True)


def check_layers(model: nn.Module) -> None:
    """Refuse layers that mix the examples of a batch, or store them in buffers without noise."""
    for name, layer in model.named_modules():
        mixes = isinstance(layer, nn.modules.batchnorm._BatchNorm)
        if mixes or getattr(layer, "track_running_stats", False):
            rule = "must not mix examples or keep running statistics"
            raise RootnoiseError(f"layer {name or 'model'} {rule}, got {type(layer).__name__}")
        if getattr(layer, "max_norm", None) is not None:
            rule = "must not rewrite its weights in forward, by the batch and without noise"
            got = f"{type(layer).__name__} with max_norm={layer.max_norm}"
            raise RootnoiseError(f"layer {name or 'model'} {rule}, got {got}")
    if not model.training:
        raise RootnoiseError("model must be in training mode, got one in evaluation mode")


class Held:
    """The trainable parameters of `module`, each of which `optimizer` must hold once.

    Attributes:
        parameters: in the module's order.
        layout: [name, shape] of each, which fixes its place in the noise.

    Raises:
        RootnoiseError: another kind of optimizer or module, or parameters that do not fit.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, module: PrivateModule) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(
            optimizer, DPOptimizer | torch.optim.LBFGS
        ):
            kind = type(optimizer).__name__
            raise RootnoiseError(f"optimizer must be a torch one that needs no closure, got {kind}")
        if not isinstance(module, PrivateModule):
            kind = type(module).__name__
            raise RootnoiseError(f"module must be wrapped by privatize(model), got {kind}")
        self.parameters, self.layout = self._found(optimizer, module)

    def check(self, optimizer: torch.optim.Optimizer, module: PrivateModule) -> None:
        """Refuse parameters that were added, removed, frozen, replaced or reshaped since."""
        parameters, layout = self._found(optimizer, module)
        same = all(p is q for p, q in zip(parameters, self.parameters, strict=False))
        if not same or layout != self.layout:
            raise RootnoiseError("trainable parameters must stay those of the first step")

    def _found(
        self, optimizer: torch.optim.Optimizer, module: PrivateModule
    ) -> tuple[list[nn.Parameter], list[list[Any]]]:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        trainable = [p for _, p in named]
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        if not held or sorted(held) != sorted(map(id, trainable)):
            known = len(set(held) & set(map(id, trainable)))
            raise RootnoiseError(
                f"optimizer must hold each of the module's {len(trainable)} trainable parameters "
                f"once and no other, got {len(held)}, among them {known} of these"
            )
        if not all(p.is_floating_point() for p in trainable):
            raise RootnoiseError("parameters must be real floating-point numbers")
        return trainable, [[name, list(p.shape)] for name, p in named]


def watched(module: PrivateModule, every: int | None) -> tuple[ForwardGuard, Probe | None]:
    """Return the guard of the model's passes, and the probe, both attached to the model.

    The garbage collector does not see the hooks that autograd's graph keeps alive. So they hold
    references to the model and its parameters, but none to an optimizer.

    Args:
        module: the model.
        every: as for `Probe`; None is no probe.
    """
    model, sharded = module._module, isinstance(module, ShardedModule)

    @contextmanager
    def quiet() -> Iterator[None]:
        guard.off = True
        try:
            with module.paused():
                yield
        finally:
            guard.off = False

    probe = None if every is None else Probe(model, quiet, sharded=sharded, every=every)
    guard = ForwardGuard(
        model,
        module.discard,
        observer=probe,
        left=lambda: module.left,
        fixed=dict(model.named_parameters()) if sharded else None,
        again=lambda: module.running_again,
    )
    return guard, probe
