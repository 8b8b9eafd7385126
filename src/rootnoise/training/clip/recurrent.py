"""torch's recurrent layers as two Linear layers a cell, on inputs and on states.

`nn.LSTM`, `nn.GRU` and `nn.RNN` run in one kernel, with nothing to tap between their steps. But what
a cell multiplies by its weights is known after forward: its inputs, and its states, which are its
outputs. So the gates of all steps are two products, their gradients one loop back over the steps
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
    """Return whether a layer is a recurrent one of torch, without projections or dropout."""
    kinds = nn.LSTM, nn.GRU, nn.RNN
    return (
        type(module) in kinds
        and not module.proj_size
        and (not module.dropout or module.num_layers == 1)
    )


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

        Raises:
            RootnoiseError: arguments or outputs without one row an example; packed sequences.
        """
        structure, rest, places, mine, *_ = call.context
        module, rows = self._module, call.layer.book.rows
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
        with torch.autocast(x.device.type, enabled=False):
            return self._unrolled(x, starts, outputs)

    def _unrolled(
        self, x: torch.Tensor, starts: Any, outputs: list[torch.Tensor | None]
    ) -> dict[nn.Linear, Steps]:
        module, found = self._module, {}
        ways, width = len(self.cells[0]), module.hidden_size
        if not starts:
            zero = x.new_zeros(module.num_layers * ways, x.shape[1], width)
            starts = (zero, zero) if isinstance(module, nn.LSTM) else (zero,)
        layers = []  # inputs and states of each cell
        for i, cells in enumerate(self.cells):
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
                    below += steps[0][1] @ cell.inputs.weight
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
    weights = [w.detach() for w in weights]
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
    a = nn.functional.linear(x, cell.inputs.weight, cell.inputs.bias)
    b = nn.functional.linear(before, cell.states.weight, cell.states.bias)
    weight = cell.states.weight
    zero = torch.zeros_like(starts[0])
    late = [zero if e is None else e for e in ends]
    if isinstance(module, nn.LSTM):
        left = right = _lstm(a + b, starts[1], weight, g, late[0], late[1])
    elif isinstance(module, nn.GRU):
        left, right = _gru(a, b, before, weight, g, late[0])
    else:
        slope = 1 - y.square() if module.mode == "RNN_TANH" else (y > 0).to(y.dtype)
        left = right = _plain(slope, weight, g, late[0])
    steps = (x, left), (before, right)
    return tuple((p.flip(0), q.flip(0)) for p, q in steps) if cell.reverse else steps  # type: ignore[return-value]


def _lstm(
    gates: torch.Tensor,
    c: torch.Tensor,
    weight: torch.Tensor,
    g: torch.Tensor,
    dh: torch.Tensor,
    dc: torch.Tensor,
) -> torch.Tensor:
    """Return the gradients of the gates i, f, g, o: c' = f c + i g and h' = o tanh(c')."""
    i, f, new, o = gates.chunk(4, 2)
    i, f, new, o = i.sigmoid(), f.sigmoid(), new.tanh(), o.sigmoid()
    cells = [c]
    made = i * new
    for t in range(len(gates)):
        cells.append(torch.addcmul(made[t], f[t], cells[-1]))
    c_before, tanh = torch.stack(cells[:-1]), torch.stack(cells[1:]).tanh_()
    by_c = torch.stack([made * (1 - i), c_before * f * (1 - f), i * (1 - new.square())], 2)
    by_h = tanh * o * (1 - o)
    through = o * (1 - tanh.square())
    found = torch.empty_like(gates)
    parts = found.view(*gates.shape[:2], 4, -1)
    for t in reversed(range(len(gates))):
        dh = dh + g[t]
        dc = torch.addcmul(dc, dh, through[t])
        torch.mul(by_c[t], dc[:, None], out=parts[t, :, :3])
        torch.mul(by_h[t], dh, out=parts[t, :, 3])
        dh, dc = found[t] @ weight, dc * f[t]
    return found


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
