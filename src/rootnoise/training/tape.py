"""A recording of how a training loop computes its loss from the model's outputs, for replay.

Every call of torch's Python interface between a forward and its backward is recorded. Replayed with
other outputs and labels, it gives the loss of another batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import overrides
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from rootnoise._check import RootnoiseError

# Calls of torch between one forward and its backward, and bytes that they make beside those of 64
# outputs: what a forward without a backward leaves recording must come to an end.
MOST_CALLS, MOST_BYTES = 20_000, 2**28
# Below a traceback that names this file, though the mistake is in the caller's loss.
NOTE = "(of the loss in your loop; rootnoise only records its calls)"
GATHERS = {"__getitem__", "index_select", "gather", "take", "take_along_dim", "embedding"}
BROADCASTS = {"add", "sub", "mul", "div", "true_divide", "pow", "where", "maximum", "minimum"}
WRITES = {"__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}

_modes: Callable[[], list[Any]] = overrides._get_current_function_mode_stack
_pop_mode: Callable[[], Any] = overrides._pop_mode
_push_mode: Callable[[Any], None] = overrides._push_mode


@dataclass
class Environment:
    """The state that a call of torch depends on besides its arguments."""

    cpu: torch.Tensor
    gpus: list[torch.Tensor]
    grad: bool
    autocast: list[tuple[str, torch.dtype, bool]]

    @classmethod
    def now(cls) -> Environment:
        """Return the present state."""
        used = torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
        devices = ["cpu", "cuda"] if used else ["cpu"]
        return cls(
            torch.get_rng_state(),
            torch.cuda.get_rng_state_all() if used else [],
            torch.is_grad_enabled(),
            [(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d)) for d in devices],
        )

    @contextmanager
    def again(self) -> Iterator[None]:
        """Restore this state for a block; generators keep the positions that the block leaves."""
        torch.set_rng_state(self.cpu)
        for i, state in enumerate(self.gpus):
            torch.cuda.set_rng_state(state, i)
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for device, dtype, on in self.autocast:
                if on != torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, dtype=dtype, enabled=on))
            yield


@dataclass
class _Call:
    """One call: function, flattened arguments, result, and the memory that it read and wrote."""

    function: Callable[..., Any]
    leaves: list[Any]
    spec: TreeSpec
    result: Any
    environment: Environment
    generators: list[tuple[torch.Generator, torch.Tensor]]
    reads: set[int]
    writes: set[int]

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", "")

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [x for x in self.leaves if isinstance(x, torch.Tensor)]

    @property
    def leaves_torch(self) -> bool:
        """Whether the result is a Python or NumPy number, or several."""
        kinds = (bool, int, float, complex, list, tuple, np.ndarray, np.generic)
        return isinstance(self.result, kinds) and not any(
            isinstance(x, torch.Tensor) for x in tree_leaves(self.result)
        )


class _Recorder(TorchFunctionMode):
    """Hands calls of torch to a tape, which it does not keep alive."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = weakref.ref(tape)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        tape = self._tape()
        if tape is None:
            return func(*args, **(kwargs or {}))
        try:
            return tape.called(func, args, kwargs or {})
        except Exception as error:
            if NOTE not in getattr(error, "__notes__", ()):
                error.add_note(NOTE)
            raise


class Tape:
    """Records calls from `start` until backward begins.

    Attributes:
        trouble: why the tape cannot be replayed, if so.
        name: name of the call that returned the loss.
    """

    def __init__(self) -> None:
        self.trouble = ""
        self.name = "backward"
        self._open = False
        self._mode = _Recorder(self)
        self._left = MOST_BYTES
        self._calls: list[_Call] = []
        self._root: torch.Tensor | None = None
        self._weight: Any = None
        self._versions: dict[int, int] = {}
        self._originals: dict[int, torch.Tensor] = {}
        self._made: set[int] = set()
        self._outputs: list[torch.Tensor] = []

    def start(self, outputs: list[torch.Tensor]) -> None:
        """Start recording, with the model's outputs."""
        self._outputs = outputs
        self._made = {id(t) for t in outputs}
        self._left = MOST_BYTES + 64 * sum(t.nbytes for t in outputs)
        self._open = True
        _push_mode(self._mode)

    def stop(self) -> None:
        """Stop recording. Function modes that were entered later stay active."""
        self._open = False
        above: list[Any] = []
        while any(mode is self._mode for mode in _modes()):
            above.append(_pop_mode())
        for mode in reversed(above):
            if mode is not self._mode:
                _push_mode(mode)

    def called(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Make a call of torch, and record it while the tape runs."""
        if not self._open:
            return func(*args, **kwargs)
        if func is torch.Tensor.backward or func is torch.autograd.grad:
            first = args[0] if args else next(iter(kwargs.values()))
            self._root = first if isinstance(first, torch.Tensor) else tree_leaves(first)[0]
            name = "gradient" if func is torch.Tensor.backward else "grad_outputs"
            place = 1 if func is torch.Tensor.backward else 2
            weight = kwargs.get(name, args[place] if len(args) > place else None)
            self._weight = next(iter(tree_leaves(weight)), None)
            self._open = False
            return func(*args, **kwargs)
        return self._record(func, args, kwargs)

    def _record(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        name = getattr(func, "__name__", "")
        writes = name in WRITES or (name.endswith("_") and not name.endswith("__"))
        for t in tensors:
            if id(t) in self._made:
                continue
            if (writes or "out" in kwargs) and id(t) not in self._originals:
                self._originals[id(t)] = t.detach().clone()
            self._versions.setdefault(id(t), t._version)
        generators = [(g, g.get_state()) for g in leaves if isinstance(g, torch.Generator)]
        environment = Environment.now()
        before = [t._version for t in tensors]
        result = func(*args, **kwargs)
        written = [t for t, v in zip(tensors, before, strict=True) if t._version != v]
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        given = {id(t) for t in tensors}
        self._made |= {id(t) for t in made} - given
        self._calls.append(
            _Call(
                func,
                leaves,
                spec,
                result,
                environment,
                generators,
                {_memory(t) for t in tensors},
                {_memory(t) for t in [*written, *made]},
            )
        )
        self._left -= sum(t.nbytes for t in made if id(t) not in given)
        if len(self._calls) > MOST_CALLS:
            self._give_up(f"more than {MOST_CALLS} calls of torch")
        elif self._left < 0:
            self._give_up("more than 64 times the outputs")
        return result

    def _give_up(self, what: str) -> None:
        self.trouble = f"{what} come between forward and backward"
        self._open = False
        self._calls.clear()

    def finish(self) -> None:
        """Keep the calls that the loss depends on, and those that turn data into Python numbers."""
        if self._root is None:  # torch.autograd.backward(loss) does not tell the tape its loss
            results = [t for c in self._calls for t in tree_leaves(c.result)]
            scalars = [
                t
                for t in [*self._outputs, *results]
                if isinstance(t, torch.Tensor) and not t.dim() and t.requires_grad
            ]
            self._root = scalars[-1] if scalars else None
        if self._root is None:
            self.trouble = self.trouble or "no loss was seen between forward and backward"
            return
        roots = {_memory(t) for t in (self._root, self._weight) if isinstance(t, torch.Tensor)}
        chosen = self._slice(roots, len(self._calls), sinks=False)
        if chosen:
            self.name = self._calls[chosen[-1]].name
            chosen = self._slice(roots, chosen[-1], sinks=True)
        self._calls = [self._calls[i] for i in chosen]

    def _slice(self, needed: set[int], last: int, *, sinks: bool) -> list[int]:
        """Return the calls that write needed memory, or leave torch before the loss is computed."""
        needed, chosen = set(needed), []
        for i in reversed(range(len(self._calls))):
            call = self._calls[i]
            if call.writes & needed or (sinks and i < last and call.leaves_torch):
                chosen.append(i)
                needed |= call.reads
        return chosen[::-1]

    def play(
        self, outputs: list[torch.Tensor], rows: int, source: torch.Tensor | None, known: set[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
        """Return the loss for other outputs, its given gradient, and whether labels changed.

        Args:
            outputs: replace the model's outputs.
            rows: number of examples.
            source: the example whose labels each example gets; None keeps all labels.
            known: ids of tensors that are not labels (parameters, buffers).

        Raises:
            RootnoiseError: a Python number that depends on labels or outputs, or a tensor whose
                origin the tape does not know.
        """
        assert self._root is not None  # noqa: S101 - finish has seen to it
        replay = _Replay(self, outputs, rows, source, self._labels(rows, known))
        for call in self._calls:
            replay.call(call)
        weight = replay.value(self._weight) if isinstance(self._weight, torch.Tensor) else None
        return replay.value(self._root), weight, replay.changed

    def generators(self) -> list[torch.Generator]:
        """Return the generators that a replay will advance."""
        return [g for call in self._calls for g, _ in call.generators]

    def _labels(self, rows: int, known: set[int]) -> set[int]:
        """Return the ids of tensors from outside the tape with one or more rows per example."""
        outside = {
            id(t): t for call in self._calls for t in call.tensors if id(t) not in self._made
        }
        return {
            key
            for key, t in outside.items()
            if key not in known
            and t.grad_fn is None
            and rows
            and t.dim()
            and len(t)
            and len(t) % rows == 0
            and all(self._may_label(call, t) for call in self._calls)
            and (len(t) == rows or any(self._meets(call, t) for call in self._calls))
        }

    def _may_label(self, call: _Call, t: torch.Tensor) -> bool:
        """Whether `t` may hold labels: the call does not use it as a data set or class weights."""
        if not any(x is t for x in call.leaves):
            return True
        if call.name in GATHERS and call.leaves[0] is t:
            return not any(isinstance(x, torch.Tensor | np.ndarray) for x in call.leaves[1:])
        if t.dim() > 1:
            return True
        _, kwargs = tree_unflatten(call.leaves, call.spec)
        if any(kwargs.get(name) is t for name in ("weight", "pos_weight")):
            return False
        name = call.name.strip("_").removeprefix("r").removeprefix("i")
        wider = any(x.dim() > 1 and x.shape[-1] == len(t) for x in call.tensors)
        return not (name in BROADCASTS and wider)

    def _meets(self, call: _Call, t: torch.Tensor) -> bool:
        """Whether a call pairs the rows of `t` with rows of something computed from the outputs."""
        here = any(x is t for x in call.leaves)
        return here and any(
            id(x) in self._made and x.dim() and len(x) == len(t) for x in call.tensors
        )


class _Replay:
    """A replay of a tape with other outputs and labels, and the tensors that it computes.

    Attributes:
        changed: whether a label was replaced by a different value.
    """

    def __init__(
        self,
        tape: Tape,
        outputs: list[torch.Tensor],
        rows: int,
        source: torch.Tensor | None,
        labels: set[int],
    ) -> None:
        self._tape, self._rows, self._source, self._labels = tape, rows, source, labels
        self._outputs = outputs
        self._new = {id(t): new for t, new in zip(tape._outputs, outputs, strict=True)}
        self.changed = False

    def value(self, t: torch.Tensor) -> torch.Tensor:
        """Return the tensor that replaces a recorded one."""
        if id(t) not in self._new:
            self._new[id(t)] = self._output(t) if t.grad_fn is not None else self._outside(t)
        return self._new[id(t)]

    def _output(self, t: torch.Tensor) -> torch.Tensor:
        """Return the replacement of an output, or of another view of it that a hook returned."""
        for old, new in zip(self._tape._outputs, self._outputs, strict=True):
            if _memory(old) == _memory(t) and (old.shape, old.stride()) == (t.shape, t.stride()):
                return new
        rule = "must come from what forward returned, by torch's own functions"
        raise RootnoiseError(f"loss {rule}, got a tensor of {t.grad_fn.name()}")  # type: ignore[union-attr]

    def _outside(self, t: torch.Tensor) -> torch.Tensor:
        """Return a tensor from before the recording, with rows replaced if it holds labels."""
        first = self._tape._originals.get(id(t), t)
        if first is t and t._version != self._tape._versions.get(id(t), t._version):
            raise RootnoiseError("tensors of the loss must not be written to, got one that was")
        if self._source is not None and id(t) in self._labels:
            return self._replaced(first.detach())
        return t if first is t else first.clone()

    def _replaced(self, t: torch.Tensor) -> torch.Tensor:
        assert self._source is not None  # noqa: S101 - for the type checker
        new = _taken(t, self._rows, self._source)
        self.changed |= not torch.equal(new, t)
        return new

    def call(self, call: _Call) -> None:
        """Repeat a call."""
        inputs = [self.value(x) if isinstance(x, torch.Tensor) else x for x in call.leaves]
        args, kwargs = tree_unflatten(inputs, call.spec)
        for generator, state in call.generators:
            generator.set_state(state)
        with call.environment.again():
            result = call.function(*args, **kwargs)
        if self._source is not None and _picks(call, self._rows):
            target = id(call.leaves[0])
            if target not in self._labels and target not in self._tape._made:
                result = self._replaced(result)
        if call.leaves_torch and not _equal(result, call.result):
            rule = "must not depend on a number that left torch"
            cure = "keep it a tensor, or ask for it after the loss is made"
            raise RootnoiseError(f"loss {rule}, got one by {call.name}: {cure}")
        for old, new in zip(tree_leaves(call.result), tree_leaves(result), strict=True):
            # Inside an autograd.Function nothing has gradients; the result got its grad_fn later.
            hidden = isinstance(old, torch.Tensor) and old.grad_fn and not call.environment.grad
            if isinstance(old, torch.Tensor) and not hidden:
                self._new[id(old)] = new


def _picks(call: _Call, rows: int) -> bool:
    """Whether a call takes a batch's rows from a data set with an index that is not a tensor."""
    if call.name != "__getitem__" or not isinstance(call.result, torch.Tensor):
        return False
    target, index = call.leaves[0], call.leaves[1:]
    numbers = len(index) == rows and all(isinstance(x, int) for x in index)
    by_array = numbers or any(isinstance(x, np.ndarray) for x in index)
    chosen = len(target) != rows or by_array
    none = not any(isinstance(x, torch.Tensor) for x in index)
    return chosen and none and bool(call.result.dim()) and len(call.result) == rows


def _taken(t: torch.Tensor, rows: int, source: torch.Tensor) -> torch.Tensor:
    """Return `t` with each example's rows replaced by those of its source."""
    if not len(t):
        return t
    return t.reshape(rows, -1)[source.to(t.device)].reshape(t.shape)


def _equal(a: Any, b: Any) -> bool:
    one, other = np.asarray(a), np.asarray(b)
    return one.shape == other.shape and bool(np.array_equal(one, other))


def _memory(t: torch.Tensor) -> int:
    """Return a number that all views of the same memory share."""
    try:
        return int(t.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(t)
