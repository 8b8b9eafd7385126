"""Keep what backward passes through a layer, and keep gradients out of its parameters.

While a tapped layer computes its output, its parameters need no gradient, so backward through it
makes that of its input alone. Everywhere else they do: a use outside their layer reaches the
parameter, and is refused there by name. So no path leads to a parameter but through a tap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from rootnoise._check import RootnoiseError


@dataclass
class Call:
    """One call of a layer in the forward pass, and the micro-batch that it belongs to.

    Attributes:
        layer: whose call it is.
        batch: number of the micro-batch.
        context: how to repeat the call: structure of its arguments, what is no tensor in them,
            and autocast's dtype.
        seen: whether backward has come through.
    """

    layer: Tapped
    batch: int
    context: Any = None
    seen: bool = False


class Tap(torch.autograd.Function):
    """The identity on a layer's output; its backward hands over the gradient and the inputs.

    Inputs are saved as autograd saves them, so that checkpointing recomputes them. The output is
    passed in place: what follows may overwrite it, as ReLU does.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Call, anchor: torch.Tensor, output: torch.Tensor, *inputs: torch.Tensor
    ) -> torch.Tensor:
        """Return the output. `anchor` needs a gradient, so the output does."""
        ctx.call = call
        ctx.save_for_backward(*inputs)
        ctx.mark_dirty(output)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        """Hand over, and pass the gradient on."""
        inputs = ctx.saved_tensors  # once: checkpointing recomputes no second time
        ctx.call.layer.take(ctx.call, inputs, gradients)
        return None, None, *gradients, *(None for _ in inputs)


class Copied(torch.autograd.Function):
    """A `Tap` for several outputs, or those that the layer itself keeps: it copies them."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, anchor: torch.Tensor, count: int, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return copies of the first `count` tensors, the outputs; the others are inputs."""
        ctx.call = call
        ctx.save_for_backward(*tensors[count:])
        ctx.set_materialize_grads(False)
        return tuple(t.clone() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        """Hand over, and pass the gradients on."""
        inputs = ctx.saved_tensors
        ctx.call.layer.take(ctx.call, inputs, gradients)
        return None, None, None, *gradients, *(None for _ in inputs)


@dataclass
class Book:
    """What all tapped layers of a model share: which micro-batch they serve.

    Attributes:
        batch: number of the micro-batch.
        rows: its examples.
        open: whether taps are set: from the forward to the use of what its backward left.
        inside: whether the forward is running.
        gradients: whether backward has reached a tap.
        paused: whether a layer is run again, untapped.
    """

    batch: int = 0
    rows: int = 0
    open: bool = False
    inside: bool = False
    gradients: bool = False
    paused: bool = False
    anchor: torch.Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))


@dataclass(eq=False)
class Tapped:
    """A layer whose calls are tapped.

    Attributes:
        name: of the layer, for messages.
        module: the layer.
        parameters: its trainable ones by name.
        names: of its forward's arguments, a row an example in the first; None for a layer of any
            kind, all of whose arguments and outputs are tapped.
        keep: takes a call, its inputs and the gradients of its outputs, in backward.
    """

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    names: Sequence[str] | None
    book: Book
    keep: Callable[[Call, Sequence[torch.Tensor], Sequence[torch.Tensor | None]], None]
    active: bool = False

    def hook(self) -> None:
        """Tap every call of the layer from now on."""
        self.module.register_forward_pre_hook(self.enter)
        self.module.register_forward_hook(self.leave, with_kwargs=True, always_call=True)

    def enter(self, module: nn.Module, args: Any) -> None:
        """Take the parameters out of autograd for this call."""
        book = self.book
        if not book.open or book.paused or not torch.is_grad_enabled():
            return
        if not book.inside and torch._C._current_graph_task_id() < 0:  # in neither pass
            rule = "must be called by its model alone between forward and step"
            raise RootnoiseError(f"layer {self.name} {rule} (evaluate under no_grad)")
        self.active = True
        for p in self.parameters.values():
            p.requires_grad_(False)

    def leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Put the parameters back, and tap the call."""
        if not self.active:
            return None
        self.active = False
        for p in self.parameters.values():
            p.requires_grad_(True)
        if output is None:  # the call raised
            return None
        call = Call(self, self.book.batch)
        if self.names is None:
            return self._tap_whole(call, args, kwargs, output)
        given = dict(zip(self.names, args, strict=False)) | kwargs
        tensors = {n: x.detach() for n, x in given.items() if isinstance(x, torch.Tensor)}
        if len(self.names) == 1:
            self._check_rows(tensors[self.names[0]])
        self._check_rows(output)
        call.context = tuple(tensors)
        tap: Any = Tap
        return tap.apply(call, self.book.anchor, output, *tensors.values())

    def _tap_whole(self, call: Call, args: Any, kwargs: Any, output: Any) -> Any:
        outputs, shape = tree_flatten(output)
        arguments, structure = tree_flatten((args, kwargs))
        mine = [i for i, x in enumerate(outputs) if _differentiable(x)]
        tensors = [x.detach() for x in arguments if isinstance(x, torch.Tensor)]
        rest = [None if isinstance(x, torch.Tensor) else x for x in arguments]
        places = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor)]
        kind = next((x.device.type for x in tensors), "cpu")
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        call.context = (structure, rest, places, mine, kind, cast)
        tap: Any = Copied
        tapped = tap.apply(call, self.book.anchor, len(mine), *(outputs[i] for i in mine), *tensors)
        for i, x in zip(mine, tapped, strict=True):
            outputs[i] = x
        return tree_unflatten(outputs, shape)

    def _check_rows(self, x: Any) -> None:
        if not isinstance(x, torch.Tensor) or x.dim() == 0 or len(x) != self.book.rows:
            got = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise RootnoiseError(
                f"layer {self.name} must take and give one row an example ({self.book.rows}), got "
                f"{got}: keep the batch its first dimension, and expand what all examples share"
            )

    def take(
        self, call: Call, inputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
    ) -> None:
        """Keep what backward brings to one call."""
        if not self.book.open or call.batch != self.book.batch:
            raise RootnoiseError(
                f"backward must be that of the last forward, got an older one at layer {self.name}"
            )
        if call.seen:
            raise RootnoiseError(
                f"backward must run once a micro-batch, got a second at layer {self.name}"
            )
        call.seen = True
        self.book.gradients = True
        with torch.no_grad():
            if any(g is not None for g in gradients):
                self.keep(call, inputs, gradients)


def guard_parameter(name: str, parameter: nn.Parameter) -> Any:
    """Refuse gradients that reach a parameter itself, outside of its layer's calls."""

    def refuse(_: torch.Tensor) -> None:
        raise RootnoiseError(
            f"parameter {name} must be used by its own layer's call alone, in a forward of the "
            "private module in training mode, got a gradient from elsewhere"
        )

    hooked: Any = parameter
    return hooked.register_hook(refuse)


def _differentiable(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())
