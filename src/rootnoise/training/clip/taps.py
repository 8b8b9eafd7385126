"""Taps: keep a layer's inputs and output gradients, and keep gradients out of its parameters.

While a tapped layer computes its output, its parameters do not require gradients, so backward
through it computes the gradient of its input alone. Everywhere else they do: a use of a parameter
outside its layer reaches the parameter, and is refused there by name. So every path to a parameter
leads through a tap.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from rootnoise._check import RootnoiseError

Taps = tuple[dict[str, torch.Tensor], torch.Tensor]  # a call's inputs by name, output gradient


@dataclass
class Call:
    """One call of a layer in the forward pass, and the micro-batch that it belongs to.

    Attributes:
        layer: the layer that was called.
        batch: number of the micro-batch.
        context: how to repeat the call: structure of its arguments, those that are not tensors,
            and autocast's dtype.
        shape: the output's shape, where what is tapped has another; or None.
        seen: whether backward has passed through.
    """

    layer: Tapped
    batch: int
    context: Any = None
    shape: torch.Size | None = None
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
        """Return the output, which requires a gradient because `anchor` does."""
        ctx.call = call
        ctx.save_for_backward(*inputs)
        ctx.mark_dirty(output)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        """Hand over inputs and gradient, and pass the gradient on."""
        inputs = ctx.saved_tensors  # read once: checkpointing does not recompute a second time
        ctx.call.layer.take(ctx.call, inputs, gradients)
        return None, None, *gradients, *(None for _ in inputs)


class Copied(torch.autograd.Function):
    """A `Tap` for several outputs, or for outputs that the layer itself keeps: it copies them."""

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
        """Hand over inputs and gradients, and pass the gradients on."""
        inputs = ctx.saved_tensors
        ctx.call.layer.take(ctx.call, inputs, gradients)
        return None, None, None, *gradients, *(None for _ in inputs)


@dataclass(eq=False)
class Book:
    """State that all tapped layers of a model share: the current micro-batch.

    Attributes:
        trainable: the model's trainable parameters by name.
        guarded: whether the caller counts passes and refuses steps accordingly; see
            `PrivateModule`.
        discard: drops what an unused forward or backward has left.
        batch: number of the micro-batch.
        rows: its number of examples; -1 until a layer has shown it.
        given: number of rows of the model's first tensor argument.
        open: whether taps are active: from the forward until what its backward left is used.
        called: whether the private module, rather than the bare model, is being called.
        inside: whether the forward is running.
        gradients: whether backward has reached a tap.
        paused: whether a layer, or the model, is being run again without taps.
        aliases: whole parameters that FSDP2 puts in the place of trainable ones for a while.
        past: the parameter that a gradient has reached past its layer since forward, or "".
    """

    trainable: dict[str, nn.Parameter]
    guarded: bool
    discard: Callable[[], None]
    batch: int = 0
    rows: int = 0
    given: int = -1
    open: bool = False
    called: bool = False
    inside: bool = False
    gradients: bool = False
    paused: bool = False
    aliases: dict[nn.Parameter, str] = field(default_factory=dict)
    past: str = ""
    anchor: torch.Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    _depth: int = 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave the taps out of a copy of the model."""
        return {"paused": True, "open": False}

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward of the model begins: open the taps if it is in training mode."""
        if self.paused or not (module.training and torch.is_grad_enabled()):
            return
        if not (self.guarded or self.called):  # `guard_parameter` will refuse its gradients
            return
        if self.inside:
            self._depth += 1
            return
        if self.open and not self.guarded:
            raise RootnoiseError(
                "forward must run once a micro-batch, got a second before the first was used "
                "(evaluate under no_grad, or drop it by zero_grad)"
            )
        self.discard()
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self.given = len(tensors[0]) if tensors and tensors[0].dim() else -1
        if self.given < 0 and not self.guarded:
            raise RootnoiseError("model must get a tensor with one row an example, got none")
        self.batch += 1
        self.past = ""
        self.rows = -1 if self.guarded else self.given
        self.open = self.inside = True

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """The forward has ended or raised."""
        if not self.inside:
            return
        if self._depth:
            self._depth -= 1
            return
        self.inside = False
        if output is None:
            self.discard()
            return
        for name in self._reached(tree_leaves(output)):
            self.discard()
            raise _elsewhere(name)

    def _reached(self, outputs: Iterable[Any]) -> Iterable[str]:
        """Yield parameters that the outputs' graph reaches; takes a microsecond per node."""
        names = {id(p): name for name, p in self.trainable.items()}
        names |= {id(p): name for p, name in self.aliases.items()}
        waiting = [x.grad_fn for x in outputs if isinstance(x, torch.Tensor)]
        seen: set[Any] = set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) in names:
                yield names[id(leaf)]
            waiting += [following for following, _ in node.next_functions]


@dataclass(eq=False)
class Tapped:
    """A layer whose calls are tapped.

    Attributes:
        name: the layer's name, for messages.
        module: the layer.
        parameters: its trainable parameters by name.
        names: names of its forward's arguments, the first with one row per example; None for a
            layer outside the table, all of whose arguments and outputs are tapped.
        keep: is called in backward with a call, its inputs and the gradients of its outputs.
    """

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    names: Sequence[str] | None
    book: Book
    keep: Callable[[Call, Sequence[torch.Tensor], Sequence[torch.Tensor | None]], None]
    active: bool = False
    held: Sequence[nn.Parameter] = ()  # parameters excluded from autograd during the call

    def __getstate__(self) -> dict[str, Any]:
        """Leave the tap out of a copy of the layer."""
        return {"book": self.book}

    def hook(self) -> None:
        """Tap every call of the layer from now on."""
        self.module.register_forward_pre_hook(self.enter)
        # First of all hooks: what they make of the output is not the layer's, and FSDP2 gathers its
        # parameters for backward only if the output that it sees requires a gradient.
        self.module.register_forward_hook(
            self.leave, prepend=True, with_kwargs=True, always_call=True
        )

    def gathered(self) -> dict[str, nn.Parameter]:
        """Return the parameters as the layer has them now: FSDP2 puts whole ones in their place."""
        return {name: self.module.get_parameter(name) for name in self.parameters}

    def enter(self, module: nn.Module, args: Any) -> None:
        """Exclude the parameters from autograd for this call."""
        book = self.book
        if not book.open or book.paused or not torch.is_grad_enabled():
            return
        if not book.inside and torch._C._current_graph_task_id() < 0:  # in neither pass
            if book.guarded:
                return
            rule = "must be called by its model alone between forward and step"
            raise RootnoiseError(f"layer {self.name} {rule} (evaluate under no_grad)")
        self.active = True
        self.held = [p for p in self.gathered().values() if p.requires_grad]
        for p in self.held:
            p.requires_grad_(False)

    def leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Put the parameters back, and tap the call."""
        if not self.active:
            return None
        self.active = False
        for p in self.held:
            p.requires_grad_(True)
        if output is None:  # the call raised
            return None
        call = Call(self, self.book.batch)
        if self.names is None:
            return self._tap_whole(call, args, kwargs, output)
        given = dict(zip(self.names, args, strict=False)) | kwargs
        tensors = {n: x.detach() for n, x in given.items() if isinstance(x, torch.Tensor)}
        if self.book.rows < 0 and isinstance(output, torch.Tensor) and output.dim():
            self.book.rows = len(output)
        if not self.book.guarded:  # a guard gives a better message; `take` catches what it misses
            self._check_rows(tensors[self.names[0]] if len(self.names) == 1 else output)
            self._check_rows(output)
        call.context = tuple(tensors)
        tap: Any = Tap
        whole = output._base
        alike = whole is not None and whole.numel() == output.numel()
        if not (alike and whole.is_contiguous() and output.is_contiguous()):
            return tap.apply(call, self.book.anchor, output, *tensors.values())
        # A view, as Linear gives of more than two dimensions: tapped itself, it would have autograd
        # copy its gradient. What it is a view of is tapped, and viewed again.
        call.shape = output.shape
        return tap.apply(call, self.book.anchor, whole, *tensors.values()).view(output.shape)

    def _tap_whole(self, call: Call, args: Any, kwargs: Any, output: Any) -> Any:
        if self.book.rows < 0:
            self.book.rows = self.book.given
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
        """Keep the gradients that backward brings to one call."""
        if not self.book.open or call.batch != self.book.batch:
            if self.book.guarded:  # it counts as one forward too many
                return
            raise RootnoiseError(
                f"backward must be that of the last forward, got an older one at layer {self.name}"
            )
        if call.seen:
            raise RootnoiseError(
                f"backward must run once a micro-batch, got a second at layer {self.name}"
            )
        call.seen = True
        self.book.gradients = True
        if call.shape is not None:
            gradients = [g if g is None else g.reshape(call.shape) for g in gradients]
        with torch.no_grad():
            if self.names is not None and self.book.guarded:
                for x in (*inputs, *gradients) if len(self.names) == 1 else gradients:
                    if x is not None:
                        self._check_rows(x)
            if self.book.rows and any(g is not None for g in gradients):
                self.keep(call, inputs, gradients)


def guard_parameter(book: Book, name: str, parameter: nn.Parameter) -> Any:
    """Refuse gradients that reach a parameter directly, outside of its layer's calls.

    If passes are guarded, a forward that leads to the parameter was already refused (`Book.leave`).
    What remains is a term of the loss that depends on parameters alone, such as a penalty: it
    counts nothing, and the book notes it for `PrivateOptimizer`, which warns.
    """
    known = weakref.ref(book)  # the garbage collector does not see autograd's hooks

    def refuse(gradient: torch.Tensor) -> torch.Tensor | None:
        owner = known()
        if owner is None or owner.paused:
            return None
        if owner.guarded:
            if not owner.past and bool(gradient.any()):
                owner.past = name
            return torch.zeros_like(gradient)
        raise _elsewhere(name)

    hooked: Any = parameter
    return hooked.register_hook(refuse)


def shared(layers: Iterable[nn.Module]) -> set[nn.Parameter]:
    """Return the parameters that several layers, or one layer under two names, hold.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> shared([layer]), shared([layer, layer]) == {layer.weight}
    (set(), True)
    """
    held = Counter(p for x in layers for _, p in x.named_parameters(remove_duplicate=False))
    return {p for p, times in held.items() if times > 1}


def kind_of(module: nn.Module) -> type[nn.Module]:
    """Return the class of a layer, which `fully_shard` has replaced by a subclass of it.

    >>> kind_of(nn.Linear(2, 2)).__name__
    'Linear'
    """
    kind = type(module)
    return kind.__bases__[1] if isinstance(module, FSDPModule) else kind


def is_replaced(layer: nn.Module) -> bool:
    """Return whether a layer has a `forward` of its own, not its class's: some libraries' hooks.

    >>> layer = nn.Linear(2, 2)
    >>> layer.forward = lambda x: 2 * layer.weight @ x
    >>> is_replaced(layer)
    True
    """
    return "forward" in vars(layer)


def is_compiled(layer: nn.Module) -> bool:
    """Return whether a layer is compiled, by torch's marks: itself, its call, or `forward` alone.

    >>> layer = nn.Linear(2, 2)
    >>> layer.forward = torch.compile(layer.forward, backend="eager")
    >>> is_compiled(layer)
    True
    """
    if getattr(layer, "_compiled_call_impl", None) is not None:
        return True
    forward = layer.forward
    if not hasattr(forward, "_torchdynamo_orig_callable"):
        return type(layer).__name__ == "OptimizedModule"
    return not getattr(forward, "_torchdynamo_disable", False)  # torch.compiler.disable's


def is_tapped(module: nn.Module) -> bool:
    """Return whether a layer of the module is already tapped.

    >>> is_tapped(nn.Linear(2, 2))
    False
    """
    hooks = (h for layer in module.modules() for h in layer._forward_pre_hooks.values())
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return any(isinstance(x, Tapped) and not x.book.paused for x in owners)


def _elsewhere(name: str) -> RootnoiseError:
    return RootnoiseError(
        f"parameter {name} must be used by its own layer's call alone, in a forward of the "
        "private module in training mode, got a gradient from elsewhere"
    )


def _differentiable(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())


def refuse_unseen(model: nn.Module) -> None:
    """Refuse models that taps cannot see into, or layers that spread one example over others.

    Raises:
        RootnoiseError: see above.

    >>> refuse_unseen(nn.Linear(2, 2))
    """
    for name, layer in model.named_modules():
        where = f"layer {name}" if name else "model"
        if is_compiled(layer):
            raise RootnoiseError(f"{where} must not be compiled, got {type(layer).__name__}")
        for option in ("max_norm", "scale_grad_by_freq"):
            if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and getattr(layer, option):
                raise RootnoiseError(f"{where} must not use {option}, which reads the whole batch")
