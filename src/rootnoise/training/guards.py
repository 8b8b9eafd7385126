"""What every step relies on: one forward and one backward of its batch, which change nothing else.

The ledger counts the records that `step` is told of, and noise covers only what is in gradients. So
a gradient must come from that step's forward and backward alone, and data must not reach a weight
or buffer in any other way. This module does not depend on how per-sample gradients are computed.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd import Variable

from rootnoise._check import RootnoiseError
from rootnoise.training.clip.taps import is_compiled

_Place = tuple[nn.Module | None, str]
"""Where a tensor hangs: a module, and its name there; None and its full name if it is fixed."""


class Observer(Protocol):
    """Is notified of the passes that a guard counts."""

    @property
    def due(self) -> bool:
        """Whether the next forward is watched closely."""

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A training forward begins."""

    def leave(self, output: Any) -> None:
        """The forward has ended with this output."""

    def drop(self) -> None:
        """The forward is discarded."""


@dataclass
class _Pass:
    """One training forward, and how far its backward has come.

    Attributes:
        dropped: the pass was discarded; its backward is refused.
        replaceable: `zero_grad` came after forward, so the next forward may take its place.
        task: autograd's task id of its backward.
        finished: backward has run to its end, exactly once.
    """

    dropped: bool = False
    replaceable: bool = False
    task: int | None = None
    finished: bool = False


class ForwardGuard:
    """Counts passes through a model and compares its tensors, so that `check` can refuse a step.

    Forwards in training mode with gradients are counted. Parameters and buffers are compared before
    and after every forward and at the step, by tensor identity and version. Changes between a step
    and the next forward are allowed: the optimizer makes them, or a user who loads weights.

    Args:
        model: the whole model; each call of it is a forward.
        discard: drops what an unused forward or backward has left behind.
        observer: is told of each counted forward.
        left: the tensors that backward has left for the step, which must not be replaced.
        fixed: parameters to compare in place of the model's own, which FSDP2 swaps in forward.
        checkpointing: whether layers may run a second time during backward.
        again: whether a layer is being run again to compute gradients, which does not count.
    """

    def __init__(
        self,
        model: nn.Module,
        discard: Callable[[], None],
        *,
        observer: Observer | None = None,
        left: Callable[[], list[Any]] = list,
        fixed: Mapping[str, torch.Tensor] | None = None,
        checkpointing: bool = False,
        again: Callable[[], bool] = lambda: False,
    ) -> None:
        self.off, self._again = False, again
        self._model, self._discard, self._left = model, discard, left
        self._observer, self._fixed, self._checkpointing = observer, fixed, checkpointing
        self._passes: list[_Pass] = []
        self._inside: _Pass | None = None
        self._depth = 0
        self._rows: dict[str, tuple[str, int]] = {}
        self._fault = ""
        self._changed = ""
        self._before: dict[_Place, _Seen] = {}
        self._made: list[tuple[Any, int]] = []
        # Prepended: dropping an old pass must not drop what another hook has begun to keep.
        model.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
        self._parts = list(model.named_modules())
        self._layers: list[tuple[str, nn.Module]] = []
        for name, layer in model.named_modules():
            if any(p.requires_grad for p in layer.parameters(recurse=False)):
                self._layers.append((name or "model", layer))
                layer.register_forward_pre_hook(partial(self._call, name or "model"))
                layer.register_forward_hook(self._watch_layer)
        model.register_forward_hook(self._leave, with_kwargs=True, always_call=True)

    def __getstate__(self) -> dict[str, Any]:
        """Switch the guard off in a copy of the model."""
        return {"off": True}

    def clear(self) -> None:
        """Forget the passes so far, as `zero_grad` does.

        A single forward whose backward is still to come is kept: `out = model(x); zero_grad();
        loss.backward()` is a common order. The next forward replaces it.
        """
        self._depth, self._inside = 0, None  # an interrupt may have left a forward open
        waiting = len(self._passes) == 1 and self._passes[0].task is None and not self._fault
        if waiting and not self._passes[0].dropped:
            self._passes[0].replaceable = True
            self._made = []
        else:
            self.reset()

    def reset(self) -> None:
        """Forget all passes: a backward of one of them is refused from now on."""
        for one in self._passes:
            one.dropped = True
        self._passes, self._made, self._fault, self._before = [], [], "", {}
        self._discard()
        if self._observer is not None:
            self._observer.drop()

    def check(self, rows: int) -> None:
        """Refuse a step of `rows` examples without exactly one forward and one backward of them.

        Raises:
            RootnoiseError: another number of forwards or backwards, or an incomplete one; a layer
                called outside the model's forward; a parameter or buffer that has changed since
                forward began; per-sample gradients that were replaced after backward.
        """
        if not self._changed and self._before:
            self._compare("between forward and step")
        if self._changed:
            raise RootnoiseError(self._changed)
        if self._fault:
            raise RootnoiseError(self._fault)
        n = len(self._passes)
        if n > 1 or (rows and n == 0):
            rule = "forward must run once a step (evaluate under no_grad, drop one by zero_grad)"
            raise RootnoiseError(f"{rule}, got {n} in training mode since the last step")
        if rows and not self._passes[0].finished:
            raise RootnoiseError(
                "backward must run once a step, through what forward returned, and to its end; "
                f"got {'none' if self._passes[0].task is None else 'one broken off'}"
            )
        left = self._left() if self._made else []
        if len(left) != len(self._made) or any(
            now is not then or _version(now) != v
            for now, (then, v) in zip(left, self._made, strict=True)
        ):
            raise RootnoiseError(
                "per-sample gradients must be those that backward left, got others"
            )

    # ------------------------------------------------------------------------------------ passes

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.off or self._again():
            return
        self._depth += 1
        if self._depth > 1:
            return
        counted = torch.is_grad_enabled() and self._in_training()
        if counted:
            self._refuse_compiled()
        if counted:
            if self._passes and self._passes[-1].replaceable:
                self.reset()
            self._inside = _Pass()
            self._passes.append(self._inside)
            self._rows = {}
        deep = counted and self._observer is not None and self._observer.due
        if counted or not self._passes:
            self._before = {n: _Seen.of(t, deep) for n, t in self._tensors()}
        if counted and self._observer is not None:
            self._observer.enter(args, kwargs)

    def _refuse_compiled(self) -> None:
        """Refuse a model of which a part is compiled, or what calls it."""
        part = next((name for name, layer in self._parts if is_compiled(layer)), None)
        if part is None and not _within_compiled():
            return
        self._depth = 0
        where, what = (f"layer {part}", "its forward") if part else ("model", "it")
        raise RootnoiseError(
            f"{where} must run as it is, for torch.compile skips what guards it, got {what} "
            "compiled: leave torch.compile out, or compile for inference under no_grad"
        )

    def _in_training(self) -> bool:
        """Whether the layers with trainable parameters are in training mode."""
        modes = {layer.training for _, layer in self._layers}
        if modes == {True, False}:
            name, layer = next((n, m) for n, m in self._layers if not m.training)
            self._depth = 0
            raise RootnoiseError(
                f"layer {name} ({type(layer).__name__}) must be in training mode, as the others "
                "whose parameters are trained, got evaluation mode: freeze it, or run under no_grad"
            )
        return modes == {True}

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.off or self._again() or not self._depth:
            return
        self._depth -= 1
        if self._depth:
            return
        one, self._inside = self._inside, None
        self._compare("in forward")
        if self._changed:
            self.reset()
            raise RootnoiseError(self._changed)
        if one is None:
            if not self._passes:
                self._before = {}
            return
        if output is None:  # forward raised an exception
            self.reset()
            return
        self._check_rows()
        for t in tensors_of(output):
            self._watch(one, t)
        if self._observer is not None:
            self._observer.leave(output)

    def _call(self, name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if self.off or self._again() or not (layer.training and torch.is_grad_enabled()):
            return
        if torch._C._current_graph_task_id() != -1:
            if not self._checkpointing:
                rule = "must run once a forward: switch activation checkpointing off"
                raise RootnoiseError(f"layer {name} {rule}, got a second run during backward")
            return
        if torch.compiler.is_dynamo_compiling():  # within a compiled function that bears no mark
            self._refuse_compiled()
        if not self._depth:
            rule = "must be called by the model's forward alone in training mode"
            self._fault = f"layer {name} {rule} (else under no_grad), got a call of its own"
            return
        tensors = [t for t in args if isinstance(t, torch.Tensor) and t.dim()]
        if tensors and type(layer).__name__ != "RNNLinear":  # Opacus pads packed sequences there
            i = len(tensors) - 1
            self._rows[name] = type(layer).__name__, len(by_example(layer, i, tensors[i]))

    def _check_rows(self) -> None:
        """Refuse a layer whose input has a different number of rows than most layers' inputs."""
        counts = Counter(n for _, n in self._rows.values()).most_common(1)
        for name, (kind, n) in self._rows.items():
            if n != counts[0][0]:
                self.reset()
                raise RootnoiseError(
                    f"layer {name} ({kind}) must get one row an example ({counts[0][0]}), got {n}: "
                    "expand its input over the batch, or freeze the layer"
                )

    def _watch_layer(self, layer: nn.Module, args: Any, output: Any) -> None:
        if not self.off and self._inside is not None:
            for t in tensors_of(output):
                self._watch(self._inside, t, whole=not self._checkpointing)

    def _watch(self, one: _Pass, t: torch.Tensor, whole: bool = True) -> None:
        if whole and t.requires_grad:
            t.register_hook(partial(self._backward, one))  # type: ignore[no-untyped-call]

    def _backward(self, one: _Pass, gradient: torch.Tensor) -> None:
        if self.off:
            return
        if one.dropped:
            raise RootnoiseError(
                "backward must be of the last forward, got one that zero_grad, a step or another "
                "forward has dropped"
            )
        task = torch._C._current_graph_task_id()
        if one.task is None:
            one.task = task
            Variable._execution_engine.queue_callback(partial(self._finish, one))
        elif one.task != task:
            one.finished = False
            self._fault = "backward must run once a step, got a second one of the same forward"
            raise RootnoiseError(self._fault)

    def _finish(self, one: _Pass) -> None:
        one.finished = not self._fault
        self._made = [(t, _version(t)) for t in self._left()]

    # ----------------------------------------------------------------------------------- tensors

    def _tensors(self) -> Iterator[tuple[_Place, torch.Tensor]]:
        """Yield each parameter and buffer with its module and name there.

        torch's own walk, which makes full names and is done three times a micro-batch, took four
        times as long.
        """
        for name, p in (self._fixed or {}).items():
            yield (None, name), p
        for module in self._model.modules():
            own = module._parameters if self._fixed is None else {}
            for name, t in (*own.items(), *module._buffers.items()):
                if t is not None:
                    yield (module, name), t

    def _compare(self, when: str) -> None:
        """Record the first parameter or buffer that has changed."""
        now = dict(self._tensors())
        for place in self._before | now:
            then = self._before.get(place)
            if then is not None and place in now and then.same(now[place], self._fixed is None):
                continue
            module, leaf = place
            names = (n for n, m in self._model.named_modules() if m is module)
            layer = next(names, "")
            if module is None:
                layer, _, leaf = leaf.rpartition(".")
            kind = type(module).__name__ if self._fixed is None else "sharded"
            self._changed = (
                f"layer {layer or 'model'} ({kind}) must leave its {leaf} as it is "
                f"{when}: data would reach it without noise; got a change"
            )
            return


@dataclass
class _Seen:
    """A snapshot of a tensor, to compare with later."""

    tensor: torch.Tensor
    version: int
    place: int
    values: torch.Tensor | None

    @classmethod
    def of(cls, t: torch.Tensor, deep: bool) -> _Seen:
        """Take a snapshot; a `deep` one holds the values too, to detect writes through `.data`."""
        t = getattr(t, "_local_tensor", t)
        values = t.detach().clone() if deep else None
        return cls(t, _version(t), t.data_ptr(), values)

    def same(self, t: torch.Tensor, identical: bool) -> bool:
        """Whether `t` is unchanged since the snapshot."""
        now = getattr(t, "_local_tensor", t)
        if (identical and now is not self.tensor) or now.shape != self.tensor.shape:
            return False
        if _version(now) != self.version or now.data_ptr() != self.place:
            return False
        then = self.values
        return then is None or bool(((now == then) | ((now != now) & (then != then))).all())


def tensors_of(value: Any, depth: int = 4) -> list[torch.Tensor]:
    """Return the tensors in an output, searching containers and the attributes of other objects.

    >>> tensors_of({"a": torch.zeros(1), "b": [torch.ones(1), 2]})
    [tensor([0.]), tensor([1.])]
    """
    if isinstance(value, torch.Tensor):
        return [value]
    if not depth or value is None or isinstance(value, str | bytes | int | float):
        return []
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    else:
        parts = list(vars(value).values()) if hasattr(value, "__dict__") else []
    return [t for part in parts for t in tensors_of(part, depth - 1)]


def by_example(layer: nn.Module, index: int, t: torch.Tensor) -> torch.Tensor:
    """Return a view, examples first, of the tensor that a layer gets or gives at `index`.

    >>> by_example(nn.LSTM(2, 3), 0, torch.zeros(7, 4, 2)).shape  # 7 steps
    torch.Size([4, 7, 2])
    """
    if isinstance(layer, nn.RNNBase) and t.dim() > 2 and (index or not layer.batch_first):
        return t.transpose(0, 1)
    return t


def _within_compiled() -> bool:
    """Whether `torch.compile` runs what called this: then its `compile_wrapper` is on the stack.

    The compiler does not trace this function, and torch has no public one that says the same.
    """
    if "torch._dynamo" not in sys.modules:
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper":
            return True
        frame = frame.f_back
    return False


vars(_within_compiled)["_torchdynamo_disable"] = (
    True  # as torch.compiler.disable, whose import is slow
)


def _version(t: Any) -> int:
    """Return how often a tensor was written in place; -1 for inference tensors."""
    return -1 if not isinstance(t, torch.Tensor) or t.is_inference() else t._version
