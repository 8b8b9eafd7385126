"""torch's recurrent layers as two Linear layers a cell, on inputs and on states.

`nn.LSTM`, `nn.GRU` and `nn.RNN` run in one kernel, with nothing to tap between their steps. But
what a cell multiplies by its weights is known after forward: its inputs, and its states, which are
its outputs. So the gates of all steps are two products, their gradients one loop back over time
(Werbos, 1990, "Backpropagation through time"), and the gradient of each weight is that of a Linear
layer whose tokens are the steps.

All of it is made from one example's arrays, so that its errors cost accuracy and no privacy: what
is added is measured, as in every Linear layer (`clip.bounds`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_unflatten

from rootnoise._check import RootnoiseError
from rootnoise.training.clip.fallback import input_dims, output_dim
from rootnoise.training.clip.taps import Call

Steps = tuple[torch.Tensor, torch.Tensor]
"""Of all steps, (steps, examples, width): what is multiplied, and the gradient of the product."""


def unrolls(module: nn.Module) -> bool:
    """Return whether a layer is a recurrent one of torch, without projections or dropout.

    Its weights must be parameters of its own: those of `weight_norm` are made of others.
    """
    kinds = nn.LSTM, nn.GRU, nn.RNN
    if not isinstance(module, kinds) or type(module) not in kinds:
        return False
    if any(name not in module._parameters for name in module._flat_weights_names):
        return False
    return not module.proj_size and (not module.dropout or module.num_layers == 1)


@dataclass(frozen=True)
class Cell:
    """One layer of one direction.

    Attributes:
        inputs: the Linear layer on the inputs; it shares the weights of the cell.
        states: that on the states.
        reverse: whether it runs from the last step to the first.
    """

    inputs: nn.Linear
    states: nn.Linear
    reverse: bool


class Recurrent:
    """A recurrent layer, cell by cell: `cells` has a list for each of its layers."""

    def __init__(self, name: str, module: Any) -> None:
        self.name, self._module = name, module
        ways = ("", "_reverse") if module.bidirectional else ("",)
        self.cells = [
            [
                Cell(self._linear(f"ih_l{i}{way}"), self._linear(f"hh_l{i}{way}"), bool(way))
                for way in ways
            ]
            for i in range(module.num_layers)
        ]

    def _linear(self, place: str) -> nn.Linear:
        weight = getattr(self._module, f"weight_{place}")
        made = nn.Linear(weight.shape[1], weight.shape[0], self._module.bias, device="meta")
        made.weight = weight
        if self._module.bias:
            made.bias = getattr(self._module, f"bias_{place}")
        return made

    def taps(
        self,
        call: Call,
        inputs: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
    ) -> dict[nn.Linear, Steps]:
        """Return what each Linear layer has multiplied in a call, and the gradients there.

        Args:
            call: of the layer.
            inputs: its tensors, and its first output.
            gradients: of its outputs.

        Raises:
            RootnoiseError: arguments or outputs without one row an example; packed sequences.
        """
        structure, rest, places, mine, *_ = call.context
        module, rows = self._module, call.layer.book.rows
        *inputs, made = inputs
        input_dims(call.layer, structure, rest, places, inputs)
        outputs: list[torch.Tensor | None] = [None] * 3
        for j, g in zip(mine, gradients, strict=True):
            if g is not None and (g.dim() < 3 or g.shape[output_dim(module, j)] != rows):
                rule = f"must give one row an example ({rows})"
                raise RootnoiseError(f"layer {self.name} {rule}, got shape {tuple(g.shape)}")
            outputs[j] = None if g is None else _wide(g)
        leaves = list(rest)
        for place, x in zip(places, inputs, strict=True):
            leaves[place] = _wide(x)
        args, kwargs = tree_unflatten(leaves, structure)
        given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
        x = given["input"].transpose(0, 1) if module.batch_first else given["input"]
        starts = given.get("hx")
        starts = () if starts is None else starts if isinstance(starts, tuple) else (starts,)
        y = _wide(made.transpose(0, 1) if module.batch_first else made)
        with torch.autocast(x.device.type, enabled=False):
            return self._unrolled(x, y, starts, outputs)

    def _unrolled(
        self, x: torch.Tensor, y: torch.Tensor, starts: Any, outputs: list[torch.Tensor | None]
    ) -> dict[nn.Linear, Steps]:
        module, found = self._module, {}
        ways, width = len(self.cells[0]), module.hidden_size
        if not starts:
            zero = x.new_zeros(module.num_layers * ways, x.shape[1], width)
            starts = (zero, zero) if isinstance(module, nn.LSTM) else (zero,)
        layers = []  # inputs and states of each cell
        for i, cells in enumerate(self.cells):
            if i == len(self.cells) - 1:
                made = list(torch.split(y, width, 2))
            else:
                made = [
                    _forward(module, cell, x, [s[i * ways + k] for s in starts])
                    for k, cell in enumerate(cells)
                ]
            layers.append((x, made))
            x = torch.cat(made, 2)
        g = outputs[0]
        if g is None:
            g = torch.zeros_like(x)
        elif module.batch_first:
            g = g.transpose(0, 1)
        for i in reversed(range(len(layers))):
            x, made = layers[i]
            below = torch.zeros_like(x)
            for k, (cell, y) in enumerate(zip(self.cells[i], made, strict=True)):
                place = i * ways + k
                ends = [None if e is None else e[place] for e in outputs[1:]]
                own = g[:, :, k * width : (k + 1) * width]
                steps = _backward(module, cell, x, y, [s[place] for s in starts], own, ends)
                found[cell.inputs], found[cell.states] = steps
                if i:
                    below += steps[0][1] @ _wide(cell.inputs.weight)
            g = below
        return found


def _forward(module: Any, cell: Cell, x: torch.Tensor, starts: list[torch.Tensor]) -> torch.Tensor:
    """Return the outputs of a cell, (steps, examples, width), by torch's kernel."""
    weights = [cell.inputs.weight, cell.states.weight]
    if module.bias:
        weights += [cell.inputs.bias, cell.states.bias]
    first = [s[None].contiguous() for s in starts]
    start: Any = first if isinstance(module, nn.LSTM) else first[0]
    kernel: Any = getattr(torch, module.mode.lower())
    x = x.flip(0) if cell.reverse else x
    weights = [_wide(w.detach()) for w in weights]
    y = kernel(x.contiguous(), start, weights, module.bias, 1, 0.0, False, False, False)[0]
    return cast(torch.Tensor, y.flip(0) if cell.reverse else y)


def _backward(
    module: Any,
    cell: Cell,
    x: torch.Tensor,
    y: torch.Tensor,
    starts: list[torch.Tensor],
    g: torch.Tensor,
    ends: list[torch.Tensor | None],
) -> tuple[Steps, Steps]:
    """Return the steps of a cell's inputs and states, for the gradients of outputs and ends."""
    if cell.reverse:
        x, y, g = x.flip(0), y.flip(0), g.flip(0)
    before = torch.cat([starts[0][None], y[:-1]])
    weight = _wide(cell.states.weight)
    zero = torch.zeros_like(starts[0])
    late = [zero if e is None else e for e in ends]
    if isinstance(module, nn.LSTM):
        a, b = _products(cell, x, before)
        left = right = _lstm(a.add_(b), starts[1], weight, g, late[0], late[1])
    elif isinstance(module, nn.GRU):
        left, right = _gru(*_products(cell, x, before), before, weight, g, late[0])
    else:
        slope = 1 - y.square() if module.mode == "RNN_TANH" else (y > 0).to(y.dtype)
        left = right = _plain(slope, weight, g, late[0])
    steps = (x, left), (before, right)
    return tuple((p.flip(0), q.flip(0)) for p, q in steps) if cell.reverse else steps  # type: ignore[return-value]


def _products(cell: Cell, x: torch.Tensor, before: torch.Tensor) -> Steps:
    return _product(cell.inputs, x), _product(cell.states, before)


def _product(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    bias = None if linear.bias is None else _wide(linear.bias)
    return nn.functional.linear(x, _wide(linear.weight), bias)


def _lstm(
    gates: torch.Tensor,
    c: torch.Tensor,
    weight: torch.Tensor,
    g: torch.Tensor,
    dh: torch.Tensor,
    dc: torch.Tensor,
) -> torch.Tensor:
    """Make gradients of the gates i, f, g, o, in place: c' = f c + i g and h' = o tanh(c')."""
    i, f, new, o = (x.contiguous() for x in gates.chunk(4, 2))
    i.sigmoid_(), f.sigmoid_(), new.tanh_(), o.sigmoid_()
    cells, made = torch.empty(len(f) + 1, *c.shape, dtype=f.dtype, device=f.device), i * new
    cells[0] = c
    for t in range(len(f)):
        torch.addcmul(made[t], f[t], cells[t], out=cells[t + 1])
    before, tanh = cells[:-1], cells[1:].tanh()
    slopes = gates.view(*gates.shape[:2], 4, -1)  # of c' by the first three, of h' by the last
    slopes[:, :, 0] = torch.addcmul(made, made, i, value=-1)
    slopes[:, :, 1] = before * torch.addcmul(f, f, f, value=-1)
    slopes[:, :, 2] = torch.addcmul(i, made, new, value=-1)
    slopes[:, :, 3] = tanh * torch.addcmul(o, o, o, value=-1)
    through = torch.addcmul(o, o, tanh.square_(), value=-1)
    for t in reversed(range(len(f))):
        dh = dh + g[t]
        dc = torch.addcmul(dc, dh, through[t])
        slopes[t, :, :3] *= dc[:, None]
        slopes[t, :, 3] *= dh
        dh, dc = gates[t] @ weight, dc * f[t]
    return gates


def _gru(
    a: torch.Tensor,
    b: torch.Tensor,
    before: torch.Tensor,
    weight: torch.Tensor,
    g: torch.Tensor,
    dh: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of both products: n = tanh(a_n + r b_n) and h' = (1 - z) n + z h."""
    (ar, az, an), (br, bz, bn) = a.chunk(3, 2), b.chunk(3, 2)
    r, z = (ar + br).sigmoid_(), (az + bz).sigmoid_()
    n = torch.addcmul(an, r, bn).tanh_()
    by_n = (1 - z) * (1 - n.square())
    by_r, by_z = by_n * bn * r * (1 - r), (before - n) * z * (1 - z)
    slopes = torch.stack([by_r, by_z, by_n * r], 2)
    left, right = torch.empty_like(a), torch.empty_like(b)
    parts = right.view(*b.shape[:2], 3, -1)
    own = left.view_as(parts)
    for t in reversed(range(len(a))):
        dh = dh + g[t]
        torch.mul(slopes[t], dh[:, None], out=parts[t])
        torch.mul(by_n[t], dh, out=own[t, :, 2])
        dh = torch.addcmul(right[t] @ weight, dh, z[t])
    own[:, :, :2] = parts[:, :, :2]
    return left, right


def _plain(
    slope: torch.Tensor, weight: torch.Tensor, g: torch.Tensor, dh: torch.Tensor
) -> torch.Tensor:
    """Return the gradients of the products of h' = tanh or ReLU of their sum."""
    found = torch.empty_like(slope)
    for t in reversed(range(len(slope))):
        torch.mul(slope[t], dh + g[t], out=found[t])
        dh = found[t] @ weight
    return found


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
