"""torch's recurrent layers, as Linear layers whose tokens are the steps.

`nn.LSTM`, `nn.GRU` and `nn.RNN` run in one kernel, with nothing to tap between their steps. Their
forward stays that kernel, cell by cell; backward is one own loop a cell (`cells`), which finds what
each weight has multiplied, and the gradients there.

Weights whose products have the same gradient g are one layer, a `Part`: in an LSTM both weights and
both biases, whose inputs are x, h, 1 and 1. So they share the Gram matrix of g, and one product
makes their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from rootnoise._check import RootnoiseError
from rootnoise.training.clip.bounds import Sum
from rootnoise.training.clip.cells import Back, Cell, product, wide
from rootnoise.training.clip.products import KeptProducts, Products
from rootnoise.training.clip.taps import Book, Call, Tapped, Taps, is_replaced, kind_of

KINDS = (nn.LSTM, nn.GRU, nn.RNN)
Found = dict[Cell, tuple[torch.Tensor, Back]]
"""What each cell's loop back has found, beside its inputs, (steps, examples, width)."""


def unrolls(module: nn.Module) -> bool:
    """Return whether a layer is a recurrent one of torch, without projections or dropout.

    Its weights must be parameters of its own: those of `weight_norm` are made of others.
    """
    if not isinstance(module, KINDS) or kind_of(module) not in KINDS:
        return False
    ours = isinstance(getattr(vars(module).get("forward"), "__self__", None), Recurrent)
    if is_replaced(module) and not ours:  # ours is of an earlier wrapping
        return False
    if any(name not in module._parameters for name in module._flat_weights_names):
        return False
    return not module.proj_size and (not module.dropout or module.num_layers == 1)


class Part(nn.Module):
    """Parameters of a cell whose products have the same gradient.

    Attributes:
        cell: whose parameters they are.
        right: whether that gradient is one of the states alone, as in a GRU.
        widths: how many numbers each parameter multiplies.
        out: the gradient's width.
    """

    def __init__(self, cell: Cell, kinds: Sequence[str], right: bool) -> None:
        super().__init__()
        module, self.cell, self.right = cell.module, cell, right
        self.widths = {"bias_ih": 1, "bias_hh": 1}
        for kind in kinds:
            if module.bias or not kind.startswith("bias"):
                weight = getattr(module, f"{kind}_{cell.way}")
                self.register_parameter(kind, weight)
                self.widths.setdefault(kind, weight.shape[-1])
                self.out: int = len(weight)


class Steps(Products):
    """The table's row of a `Part`: its trainable parameters side by side, as one weight."""

    def __init__(self, part: Part, trainable: Sequence[str]) -> None:
        super().__init__(part, ["weight"])
        self.columns = {kind: part.widths[kind] for kind in trainable}

    def _widths(self) -> tuple[int, int]:
        return sum(self.columns.values()), self.module.out

    def taps(self, found: Found) -> Taps:
        """Return what the parameters have multiplied, side by side, and its gradient."""
        x, back = found[self.module.cell]
        one = x.new_ones(()).expand(*x.shape[:2], 1)
        inputs = {"weight_ih": x, "weight_hh": back.states, "bias_ih": one, "bias_hh": one}
        used = [inputs[kind].transpose(0, 1) for kind in self.columns]
        g = back.right if self.module.right else back.left
        return {"input": torch.cat(used, 2)}, g.transpose(0, 1).contiguous()

    def per_sample(self, taps: Taps) -> dict[str, torch.Tensor]:
        """See `Row`."""
        made = super().per_sample(taps)["weight"].view(len(taps[1]), self.module.out, -1)
        parts = torch.split(made, list(self.columns.values()), 2)
        return {kind: x.flatten(1) for kind, x in zip(self.columns, parts, strict=True)}

    def kept(self, taps: Sequence[Taps]) -> KeptProducts:
        """See `Row`."""
        return KeptSteps(self, taps)


class KeptSteps(KeptProducts):
    """The sum of all parameters side by side, and then each one's part of it.

    Of m examples that is as many additions as one by one: the first of m to nothing rounds nothing.
    """

    row: Steps

    def add_(self, sums: dict[str, Sum], scale: torch.Tensor, bad: torch.Tensor | None) -> None:
        """See `Kept`."""
        widths, vector = self.row.columns, next(iter(sums.values())).vector
        whole = Sum(vector.new_empty(self.row.module.out * sum(widths.values())))
        super().add_({"weight": whole}, scale, bad)
        joint = whole.whole().view(self.row.module.out, -1)
        parts = torch.split(joint, list(widths.values()), 1)
        for kind, part in zip(widths, parts, strict=True):
            total = sums[kind].vector.view(part.shape)
            if sums[kind].weight():
                total += part
            else:
                total.copy_(part)


class Recurrent:
    """A recurrent layer, cell by cell: `cells` has a list for each of its layers."""

    def __init__(self, name: str, module: Any) -> None:
        self.name, self._module = name, module
        ways = (False, True) if module.bidirectional else (False,)
        self.cells = [[Cell(module, i, way) for way in ways] for i in range(module.num_layers)]

    def parts(self) -> Iterator[Part]:
        """Yield the parameters that share a gradient."""
        left, right = ("weight_ih", "bias_ih"), ("weight_hh", "bias_hh")
        for cell in (cell for cells in self.cells for cell in cells):
            if self._module.mode == "GRU":
                yield Part(cell, left, right=False)
                yield Part(cell, right, right=True)
            else:
                yield Part(cell, left + right, right=False)

    def tap(self, book: Book, keep: Callable[[Found], None]) -> None:
        """Tap every call from now on; `keep` gets what its backward finds."""

        def checked(call: Call, inputs: Sequence[torch.Tensor], gradients: Any) -> None:
            self._check(inputs)
            keep(call.context)

        self._tapped = _Unrolled(self.name, self._module, {}, None, book, checked)
        self._tapped.hook()
        self._module.forward = self.forward

    def _check(self, inputs: Sequence[torch.Tensor]) -> None:
        rows, first = self._tapped.book.rows, 0 if self._module.batch_first else 1
        names = ("input", first), ("hx", 1), ("hx", 1)
        for x, (name, dim) in zip(inputs, names, strict=False):
            if x.shape[dim] != rows:
                rule = f"must take one row an example ({rows}) in dimension {dim} of {name}"
                raise RootnoiseError(f"layer {self.name} {rule}, got {tuple(x.shape)}")

    def forward(self, input: Any, hx: Any = None) -> Any:  # noqa: A002 - torch's name
        """Return what the layer's own forward returns; tapped if the book is open.

        Raises:
            RootnoiseError: packed sequences, or one sequence without a batch.
        """
        module, tapped = self._module, self._tapped
        if not tapped.active:
            return kind_of(module).forward(module, input, hx)
        if isinstance(input, PackedSequence):
            rule = "must get sequences padded to one length"
            raise RootnoiseError(f"layer {self.name} {rule}, got a PackedSequence")
        if input.dim() != 3:
            rule, got = "must take a batch of sequences", f"{input.dim()} dimensions"
            raise RootnoiseError(f"layer {self.name} {rule}, got {got}")
        book, lstm = tapped.book, isinstance(module, nn.LSTM)
        if book.rows < 0:
            book.rows = book.given
        if hx is None:
            first = input.shape[0 if module.batch_first else 1]
            places = module.num_layers * len(self.cells[0])
            zero = input.new_zeros(places, first, module.hidden_size)
            hx = (zero, zero) if lstm else zero
        module.check_forward_args(input, hx, None)
        run: Any = Loop
        starts = hx if lstm else (hx,)
        y, *last = run.apply(Call(tapped, book.batch), self, book.anchor, input, *starts)
        return y, tuple(last) if lstm else last[0]

    def run(self, x: torch.Tensor, starts: Sequence[torch.Tensor]) -> Any:
        """Return each layer's outputs, (steps, examples, width), and the last states."""
        layers: list[torch.Tensor] = []
        ends = []
        for i, cells in enumerate(self.cells):
            made = [
                cell.run(x, [s[i * len(cells) + k] for s in starts]) for k, cell in enumerate(cells)
            ]
            x = made[0][0] if len(made) == 1 else torch.cat([y for y, _ in made], 2)
            layers.append(x)
            ends += [last for _, last in made]
        return layers, [torch.stack(states) for states in zip(*ends, strict=True)]

    def back(
        self,
        x: torch.Tensor,
        starts: Sequence[torch.Tensor],
        layers: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
        wanted: bool,
    ) -> tuple[Found, torch.Tensor | None, list[torch.Tensor]]:
        """Return what all cells find, and the gradients of inputs, if wanted, and first states."""
        found: Found = {}
        firsts: list[list[torch.Tensor]] = []
        width = self._module.hidden_size
        g, *ends = gradients
        g = torch.zeros_like(layers[-1]) if g is None else g
        below: torch.Tensor | None = None
        for i in reversed(range(len(layers))):
            inputs, below = layers[i - 1] if i else x, None
            for k, cell in reversed(list(enumerate(self.cells[i]))):
                place, own = i * len(self.cells[i]) + k, slice(k * width, (k + 1) * width)
                made = cell.back(
                    inputs,
                    layers[i][:, :, own],
                    [s[place] for s in starts],
                    g[:, :, own],
                    [None if e is None else e[place] for e in ends],
                )
                found[cell] = inputs, made
                firsts.insert(0, made.starts)
                if i or wanted:
                    turned = wide(cell.weights()[0]).t()
                    below = product(made.left, turned, more=below)
            g = below if below is not None else g
        return found, below, [torch.stack(s) for s in zip(*firsts, strict=True)]


class Loop(torch.autograd.Function):
    """A recurrent layer whose backward hands over what its cells find."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        layer: Recurrent,
        anchor: torch.Tensor,
        x: torch.Tensor,
        *starts: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Return the outputs, a copy that what follows may change, and the last states."""
        ctx.call, ctx.layer, ctx.starts = call, layer, len(starts)
        first = layer._module.batch_first
        layers, last = layer.run(x.transpose(0, 1) if first else x, starts)
        ctx.save_for_backward(x, *starts, *layers)
        ctx.set_materialize_grads(False)
        y = layers[-1]
        return (y.transpose(0, 1) if first else y).clone(), *last

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        """Hand over what the cells find, and return the gradients of inputs and first states."""
        call, layer = ctx.call, ctx.layer
        x, *others = ctx.saved_tensors
        starts, layers = others[: ctx.starts], others[ctx.starts :]
        made: list[torch.Tensor | None] = [None if g is None else wide(g) for g in gradients]
        inputs, first = wide(x), layer._module.batch_first
        wanted = ctx.needs_input_grad[3]
        if first:
            inputs = inputs.transpose(0, 1)
            made[0] = None if made[0] is None else made[0].transpose(0, 1)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            outputs = [wide(y) for y in layers]
            states = [wide(s) for s in starts]
            found, below, firsts = layer.back(inputs, states, outputs, made, wanted)
            call.context = found
            call.layer.take(call, (x, *starts), gradients)
            call.context = None
        below = below.transpose(0, 1) if first and below is not None else below
        return None, None, None, below, *firsts


class _Unrolled(Tapped):
    """A recurrent layer, whose own forward taps it."""

    def _tap_whole(self, call: Call, args: Any, kwargs: Any, output: Any) -> Any:
        return None
