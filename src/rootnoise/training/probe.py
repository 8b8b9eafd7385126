"""Tests on a real batch that each example's gradient depends on that example alone.

Noise hides one clipped gradient. If a layer or a loss mixes the batch, one record moves the
gradients of the others as well, and the claim is void. So now and then a step is replayed, before
anything is released, with the same weights and random numbers and with half of the batch replaced
by examples of the other half. The examples that stayed must give the same values in forward and
backward as before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from weakref import WeakMethod

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from rootnoise._check import RootnoiseError
from rootnoise.training.guards import by_example, tensors_of
from rootnoise.training.tape import Environment, Tape

# Rows of independent examples are equal bit for bit, or differ by how a kernel splits its sums: a
# few units in the last place of the row's largest number. Weaker mixing is not detected.
TOLERANCE = 100  # times the type's epsilon, at most 0.05
FLOOR = 1e-3  # least size of a row in comparisons, relative to the largest row
CURE = "or take the duty upon you by independence='assumed'"

INTERNAL = vars(nn.Module()).keys()  # torch's own attributes; FSDP2 swaps parameters in them
_Errors = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class Probe:
    """Replays steps with half of the batch replaced; an observer of a `ForwardGuard`.

    A step is probed if its number is 0, a power of two or a multiple of `every`. If a probe is
    inconclusive, as for a batch of one example or of equal ones, the following steps are probed
    until one is conclusive.

    Args:
        model: whose layers are compared.
        quiet: a context in which passes of the model leave no per-sample gradients.
        sharded: the ranks hold parts of the model. Then every rank must call `run` at the same
            steps, backward is compared at the model's outputs alone, and no later step makes up
            for an inconclusive one.
        every: see above; 0 for powers of two alone.

    Attributes:
        probed: steps taken whose probe passed.
    """

    def __init__(
        self,
        model: nn.Module,
        quiet: Callable[[], AbstractContextManager[Any]],
        *,
        sharded: bool = False,
        every: int = 0,
    ) -> None:
        self._model, self._quiet, self._sharded, self._every = model, quiet, sharded, every
        self.probed: list[int] = []
        self._t = 0
        self._passed = self._shown = False
        self._step: _Step | None = None
        self._refusal = ""  # why the pending step was refused; a retry is refused too

    @property
    def due(self) -> bool:
        """Whether the next step is to be probed."""
        t = self._t
        planned = t & (t - 1) == 0 or (self._every > 0 and t % self._every == 0)
        return planned or not (self.probed or self._sharded)

    def next(self) -> None:
        """A step was made."""
        self.taken()
        if self._shown:
            self.probed.append(self._t)
        self._t += 1
        self._shown = False

    def taken(self) -> None:
        """A micro-batch was taken: one conclusive probe is enough for its step."""
        self._shown, self._passed = self._shown or self._passed, False

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A training forward begins: keep its inputs and the state of the generators."""
        self.drop()
        self._passed = False
        if self.due:
            self._step = _Step(args, kwargs)

    def leave(self, output: Any) -> None:
        """The forward has ended: record how the loss is computed from its output."""
        if self._step is not None:
            self._step.begin(output)

    def drop(self) -> None:
        """The forward is discarded."""
        if self._step is not None:
            self._step.tape.stop()
        self._step, self._refusal = None, ""

    def run(self, rows: int) -> None:
        """Probe the step whose forward and backward have just run, if it is due.

        Raises:
            RootnoiseError: a layer, or the loss, mixes the examples of the batch, or the step
                cannot be replayed.
        """
        if self._refusal:  # a retry of the same step: only `drop` clears it
            raise RootnoiseError(self._refusal)
        step, self._step = self._step, None
        if step is None:
            return
        step.tape.stop()
        if rows < 2 and not self._sharded:
            return
        self._refusal = "step must begin anew by zero_grad, got one whose probe was broken off"
        try:
            with self._unmoved(step.tape):
                step.tape.finish()
                self._passed = self._compare(step, rows)
        except RootnoiseError as refusal:
            self._refusal = str(refusal)
            raise
        self._refusal = ""

    def _compare(self, step: _Step, rows: int) -> bool:
        """Replay the step unchanged and with either half replaced; refuse it if results differ."""
        known = {id(t) for t in [*self._model.parameters(), *self._model.buffers()]}
        first = _Trace(self._model, rows, not self._sharded)
        sources: list[torch.Tensor | None] = [None, *_sources(rows, self._t)]
        shown, refusal = 0, ""
        for source in sources:  # all, even after a failure: other ranks wait in their forward
            trace = first if source is None else _Trace(self._model, rows, not self._sharded)
            try:
                changed = step.play(trace, source, known)
            except RootnoiseError as reason:
                refusal = refusal or f"{reason} ({CURE})"
                continue
            except _Errors as reason:
                line = " ".join(str(reason).split())
                rule = "step must run again for the probe of independence"
                refusal = refusal or f"{rule}, got {type(reason).__name__} {line:.100} ({CURE})"
                continue
            if source is None:
                refusal = refusal or trace.unlike(step)
            elif changed:
                shown += 1
                refusal = refusal or trace.mixing(first, source, step.tape.name)
        if refusal:
            raise RootnoiseError(refusal)
        return shown == 2

    @contextmanager
    def _unmoved(self, tape: Tape) -> Iterator[None]:
        """Restore generators and the plain attributes of modules on exit."""
        now = Environment.now()
        generators = [(g, g.get_state()) for g in tape.generators()]
        plain = [_Attributes(module) for module in self._model.modules()]
        try:
            with self._quiet():
                yield
        finally:
            with now.again():
                pass
            for generator, state in generators:
                generator.set_state(state)
            for attributes in plain:
                attributes.restore()


def _told(keep: WeakMethod[Any], i: int, place: int, gradients: tuple[Any, ...]) -> None:
    """Hand the gradients to the step that asked for them, if it is still there."""
    to = keep()
    if to is not None:
        to(i, place, gradients)


class _Step:
    """A recorded step: inputs, generators, outputs, their gradients, and the tape of the loss."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, self._spec = tree_flatten((args, kwargs))
        self._leaves = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in leaves]
        self._environment = Environment.now()
        self.tape = Tape()
        self.outputs: list[torch.Tensor] = []
        self.gradients: dict[int, torch.Tensor] = {}

    def begin(self, output: Any) -> None:
        """Keep what forward returned, and record."""
        outputs = tensors_of(output)
        self.outputs = [t.detach().clone() for t in outputs]
        # Weakly: what the tape keeps leads to this node, and no collector sees a cycle through it.
        keep = WeakMethod(self._keep)
        for i, t in enumerate(outputs):
            if t.grad_fn is not None:
                t.grad_fn.register_prehook(partial(_told, keep, i, t.output_nr))
        self.tape.start(outputs)

    def _keep(self, i: int, place: int, gradients: tuple[torch.Tensor | None, ...]) -> None:
        """Keep an output's gradient as it enters the model, after all hooks of the tensor."""
        g = gradients[place]
        if g is not None:
            self.gradients[i] = g

    def play(self, trace: _Trace, source: torch.Tensor | None, known: set[int]) -> bool:
        """Run forward and loss with examples replaced; return whether that changed any input.

        Raises:
            RootnoiseError: no input has one row per example, or as for `Tape.play`.
        """
        rows, leaves, changed, fits = trace.rows, list(self._leaves), False, False
        for i, x in enumerate(leaves):
            if isinstance(x, torch.Tensor) and x.dim() and len(x) == rows:
                fits = True
                if source is not None:
                    leaves[i] = x[source.to(x.device)]
                    changed |= not torch.equal(leaves[i], x)
        args, kwargs = tree_unflatten(
            [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves], self._spec
        )
        outputs = tensors_of(trace.forward(args, kwargs, self._environment))
        if not fits:
            rule = "one tensor that the model gets must have one row an example"
            raise RootnoiseError(f"{rule} ({rows}), got none")
        if self.tape.trouble:
            raise RootnoiseError(f"loss must be made in a few steps, {self.tape.trouble}")
        if len(outputs) != len(self.outputs):
            raise RootnoiseError("forward must return as many tensors again")
        given = outputs
        if not trace.deep:
            outputs = [t.detach().requires_grad_(t.is_floating_point()) for t in outputs]
            given = [t.clone() for t in outputs]  # a loss may overwrite the outputs
        loss, weight, more = self.tape.play(given, rows, source, known)
        trace.backward(loss, weight, outputs)
        return changed or more


class _Trace:
    """What a model's layers computed for a batch, forward and backward, in call order.

    Args:
        model: whose layers are traced.
        rows: number of examples.
        deep: also compare gradients inside the model, not only at its outputs.
    """

    def __init__(self, model: nn.Module, rows: int, deep: bool) -> None:
        self.rows, self._model, self.deep = rows, model, deep
        self.seen: list[tuple[str, torch.Tensor]] = []
        self.gradients: list[tuple[str, torch.Tensor | None]] = []
        self.outputs: list[torch.Tensor] = []
        self.output_gradients: list[torch.Tensor | None] = []
        self._tracked: list[tuple[str, torch.Tensor, Callable[..., torch.Tensor]]] = []

    def forward(self, args: Any, kwargs: Any, environment: Environment) -> Any:
        """Run the model, and keep the inputs and outputs of its layers."""
        handles = []
        for name, layer in self._model.named_modules():
            own = any(p.requires_grad for p in layer.parameters(recurse=False))
            if own or layer is self._model or not any(layer.children()):
                place = f"layer {name or 'model'} ({_kind(layer)})"
                if layer is not self._model:
                    handles.append(layer.register_forward_pre_hook(partial(self._before, place)))
                handles.append(layer.register_forward_hook(partial(self._after, place, own)))
        try:
            with environment.again(), torch.set_grad_enabled(self.deep):
                output = self._model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        self.outputs = [t.detach().clone() for t in tensors_of(output)]
        return output

    def _before(self, place: str, layer: nn.Module, args: Any) -> None:
        self._keep(f"what feeds {place}", layer, tensors_of(args))

    def _after(self, place: str, own: bool, layer: nn.Module, args: Any, output: Any) -> None:
        outputs = tensors_of(output)
        self._keep(place, layer, outputs)
        if own and self.deep:
            self._tracked += [
                (place, t, partial(by_example, layer, i))
                for i, t in enumerate(outputs)
                if t.requires_grad
            ]

    def _keep(self, place: str, layer: nn.Module, tensors: list[torch.Tensor]) -> None:
        rows = [by_example(layer, i, t) for i, t in enumerate(tensors)]
        self.seen += [(place, t.detach().clone()) for t in rows if t.dim() and len(t) == self.rows]

    def backward(
        self, loss: torch.Tensor, weight: torch.Tensor | None, outputs: list[torch.Tensor]
    ) -> None:
        """Keep the gradients of the loss at the model's outputs and at its layers' outputs."""
        ends = [t for t in outputs if t.requires_grad]
        targets = [*ends, *(t for _, t, _ in self._tracked)]
        found = torch.autograd.grad(loss, targets, weight, allow_unused=True)
        by_end = iter(found[: len(ends)])
        self.output_gradients = [next(by_end) if t.requires_grad else None for t in outputs]
        self.gradients = [
            (place, None if g is None else examples(g))
            for (place, t, examples), g in zip(self._tracked, found[len(ends) :], strict=True)
            if t.dim() and len(examples(t)) == self.rows
        ]
        self._tracked = []
        for t, g in zip(outputs, self.output_gradients, strict=True):
            if (
                not self.deep
                and g is not None
                and not (t.dim() and len(t) % max(self.rows, 1) == 0)
            ):
                rule = "loss of a sharded model must be made of rows that forward returns"
                raise RootnoiseError(f"{rule}, got shape {tuple(t.shape)}")

    def unlike(self, step: _Step) -> str:
        """Say how the unchanged replay of a step differs from the step."""
        all_rows = torch.ones(self.rows, dtype=torch.bool)
        for old, new in zip(step.outputs, self.outputs, strict=True):
            if _differ(old, new, self.rows, all_rows):
                return (
                    "forward must return the same again for the same batch, got something else: it "
                    "keeps what it has seen, or draws numbers outside of torch's generator "
                    f"({CURE})"
                )
        for i, g in step.gradients.items():
            if _differ(g, self.output_gradients[i], self.rows, all_rows):
                return f"loss must be made by torch's own functions, got one that is not ({CURE})"
        return ""

    def mixing(self, first: _Trace, source: torch.Tensor, loss: str) -> str:
        """Name the layer or loss that makes the kept examples depend on the replaced ones."""
        kept = source == torch.arange(self.rows)
        rule = "must not mix the examples of a batch"
        if [place for place, _ in self.seen] != [place for place, _ in first.seen]:
            return f"forward {rule}, got other layers called for other examples ({CURE})"
        for (place, old), (_, new) in zip(first.seen, self.seen, strict=True):
            if _differ(old, new, self.rows, kept):
                got = "one example's values changed when others were replaced"
                return f"{place} {rule}: {got} ({CURE})"
        got = "one example's gradient changed when others were replaced"
        ends = zip(first.output_gradients, self.output_gradients, strict=True)
        if any(_differ(a, b, self.rows, kept) for a, b in ends):
            return f"loss ({loss}) {rule}: {got} ({CURE})"
        pairs = list(zip(first.gradients, self.gradients, strict=True))
        for (place, a), (_, b) in reversed(pairs):
            if _differ(a, b, self.rows, kept):
                return f"loss, or what follows {place}, {rule}: {got} ({CURE})"
        return ""


class _Attributes:
    """A snapshot of the plain tensors and containers in a module's attributes, to restore."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._values = module, self._plain(module)
        self._copies: dict[str, Any] = {}
        for name, value in self._values.items():
            if isinstance(value, torch.Tensor):
                self._copies[name] = value.detach().clone()
            elif isinstance(value, list | dict | set | deque):
                self._copies[name] = value.copy()

    @staticmethod
    def _plain(module: nn.Module) -> dict[str, Any]:
        return {name: value for name, value in vars(module).items() if name not in INTERNAL}

    def restore(self) -> None:
        for name in self._plain(self._module).keys() - self._values.keys():
            del vars(self._module)[name]
        vars(self._module).update(self._values)
        for name, saved in self._copies.items():
            value = self._values[name]
            if isinstance(value, torch.Tensor):
                if not torch.equal(value, saved):
                    value.detach().copy_(saved)
            else:
                value.clear()
                value.extend(saved) if isinstance(value, list | deque) else value.update(saved)


def _sources(rows: int, t: int) -> list[torch.Tensor]:
    """Return the example that replaces each row, once for each of two random halves that stay."""
    if rows < 2:
        return [torch.arange(rows)] * 2
    generator = np.random.default_rng([rows, t])  # the split need not be secret
    order = generator.permutation(rows)
    sources = []
    for stays in (order[: rows // 2], order[rows // 2 :]):
        source = generator.choice(stays, rows)
        source[stays] = stays
        sources.append(torch.from_numpy(source))
    return sources


def _differ(
    old: torch.Tensor | None, new: torch.Tensor | None, rows: int, kept: torch.Tensor
) -> bool:
    """Whether the kept examples' rows of two tensors differ by more than rounding."""
    if old is None or new is None:
        one = old if new is None else new
        return one is not None and bool(one.count_nonzero())
    if old.shape != new.shape:
        return True
    if not old.dim() or not len(old) or len(old) % rows:
        return False
    a, b = (t.detach().reshape(rows, -1)[kept.to(t.device)] for t in (old, new))
    if not a.is_floating_point() or not a.numel():
        return not torch.equal(a, b)
    tolerance = min(TOLERANCE * torch.finfo(a.dtype).eps, 0.05)
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    off = torch.where(same, 0.0, a - b).abs().amax(1)
    size = torch.where(a.isfinite(), a, 0.0).abs().amax(1)
    size = size.clamp(min=FLOOR * float(size.max()))
    return not bool((off <= tolerance * size).all())


def _kind(layer: nn.Module) -> str:
    return type(layer).__name__
