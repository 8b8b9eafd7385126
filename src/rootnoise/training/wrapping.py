"""A model made ready for private training, or refused: layers, mode, wrapper, and optimizer."""

from __future__ import annotations

import warnings

import torch
from opacus import GradSampleModule
from opacus.grad_sample import AbstractGradSampleModule
from opacus.validators import ModuleValidator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from rootnoise._check import RootnoiseError
from rootnoise.training.clip import PrivateModule
from rootnoise.training.clip.taps import is_tapped
from rootnoise.training.sharded import ShardedGradSampleModule


def privatize(
    model: nn.Module, loss_reduction: str = "mean"
) -> PrivateModule | ShardedGradSampleModule:
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
            weights (`max_norm`); what `PrivateModule` refuses or, for a sharded model,
            `ShardedGradSampleModule`.
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
    if not isinstance(model, FSDPModule):
        return PrivateModule(model, loss_reduction, guarded=True)
    # torch tells every loop that the first layer's input, the data, needs no gradient.
    warnings.filterwarnings("ignore", "Full backward hook is firing when", UserWarning)
    return ShardedGradSampleModule(model, loss_reduction)


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
    if not isinstance(model, FSDPModule):
        return
    errors = [*ModuleValidator.validate(model), *GradSampleModule.validate(model, strict=False)]
    if errors:
        reason = " ".join(str(errors[0]).split())
        raise RootnoiseError(f"model must pass Opacus's checks, got {reason}")


def held_parameters(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters of `module`, which `optimizer` must hold, each once."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    if not held or sorted(held) != sorted(map(id, trainable)):
        known = len(set(held) & set(map(id, trainable)))
        raise RootnoiseError(
            f"optimizer must hold each of the module's {len(trainable)} trainable parameters once "
            f"and no other, got {len(held)}, among them {known} of these"
        )
    if not all(p.is_floating_point() for p in trainable):
        raise RootnoiseError("parameters must be real floating-point numbers")
    return trainable
