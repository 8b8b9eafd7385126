"""One cell of a recurrent layer: run by torch's kernel, and run back with own products.

The kernel keeps its gates to itself, but what a cell multiplies by its weights is known after it:
its inputs, and its states, which are its outputs. So the gates of all steps are two products, their
gradients one loop back over time (Werbos, 1990, "Backpropagation through time"), and the gradient
of each weight is that of a Linear layer whose tokens are the steps.

All of it is made from one example's arrays, so that its errors cost accuracy and no privacy: what
is added is measured, as in every Linear layer (`clip.bounds`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

# torch's own product is MKL's, which an AMD processor runs at 114 GFLOP/s, one thread, where its
# recurrent layers' oneDNN reaches 255 (2048 x 192 by 192 x 512). This is oneDNN's product.
ONEDNN: bool = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Back(NamedTuple):
    """What a cell's loop back finds; the first three are of all steps, (steps, examples, width).

    Attributes:
        states: what the recurrent weight multiplies.
        left: gradient of the product of the inputs.
        right: that of the states, the same array but for a GRU.
        starts: gradients of the first states.
    """

    states: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    starts: list[torch.Tensor]


class Cell:
    """One layer of one direction; it reads its weights from the module each time (FSDP2)."""

    def __init__(self, module: Any, layer: int, reverse: bool) -> None:
        self.module, self.reverse = module, reverse
        self.way = f"l{layer}_reverse" if reverse else f"l{layer}"

    def weights(self) -> list[torch.Tensor]:
        """Return the weights of inputs and states, and their biases if there are any."""
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        names = kinds if self.module.bias else kinds[:2]
        return [getattr(self.module, f"{name}_{self.way}").detach() for name in names]

    def run(
        self, x: torch.Tensor, starts: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the outputs, (steps, examples, width), and the last states."""
        module, lstm = self.module, isinstance(self.module, nn.LSTM)
        first = [s[None].contiguous() for s in starts]
        kernel: Any = getattr(torch, module.mode.lower())
        x = (x.flip(0) if self.reverse else x).contiguous()
        options = module.bias, 1, 0.0, module.training, False, False
        y, *last = kernel(x, first if lstm else first[0], self.weights(), *options)
        return y.flip(0) if self.reverse else y, [s[0] for s in last]

    def back(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        starts: Sequence[torch.Tensor],
        g: torch.Tensor,
        ends: Sequence[torch.Tensor | None],
    ) -> Back:
        """Return what the loop back finds, for the gradients of outputs and last states."""
        if self.reverse:
            x, y, g = x.flip(0), y.flip(0), g.flip(0)
        w, u, *biases = (wide(v) for v in self.weights())
        states, g = torch.cat([starts[0][None], y[:-1]]), g.contiguous()
        turned = u.t()  # of which oneDNN makes a quicker product than of a copy
        late = [torch.zeros_like(s) if e is None else e for s, e in zip(starts, ends, strict=True)]
        if self.module.mode == "GRU":
            a, b = product(x, w, *biases[:1]), product(states, u, *biases[1:])
            found = _gru(a, b, states, turned, g, late[0])
        elif self.module.mode == "LSTM":
            gates = product(states, u, *biases[1:], more=product(x, w, *biases[:1]))
            found = _lstm(gates, starts[1], turned, g, *late)
        else:
            slope = 1 - y.square() if self.module.mode == "RNN_TANH" else (y > 0).to(y.dtype)
            found = _plain(slope, turned, g, late[0])
        left, right, *first = found
        if self.reverse:
            same, states, left = right is left, states.flip(0), left.flip(0)
            right = left if same else right.flip(0)
        return Back(states, left, right, first)


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    more: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x weight^T + bias + more."""
    found: torch.Tensor
    if not (ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel()):
        found = functional.linear(x, weight, bias)
        return found if more is None else found.add_(more)
    if more is None:
        found = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    else:
        found = torch.ops.mkldnn._linear_pointwise.binary(x, more, weight, bias, "add")
    return found


def _lstm(
    gates: torch.Tensor,
    c: torch.Tensor,
    turned: torch.Tensor,
    g: torch.Tensor,
    dh: torch.Tensor,
    dc: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Run back c' = f c + i n and h' = o tanh(c'), for gates i, f, n, o."""
    width = c.shape[1]
    i, f, new, o = gates.chunk(4, 2)
    new.mul_(2)
    gates.sigmoid_()
    new.mul_(2).sub_(1)  # see `_tanh`
    cells, made = gates.new_empty(len(g) + 1, *c.shape), i * new
    cells[0] = c
    own, kept, forget = cells.unbind(), made.unbind(), f.unbind()
    for t in range(len(g)):
        torch.addcmul(kept[t], forget[t], own[t], out=own[t + 1])
    tanh = _tanh(cells[1:])
    by_sigmoid, by_tanh = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward
    through = by_tanh(o, tanh)  # o (1 - tanh^2), of h' by c'
    slopes = torch.empty_like(gates)  # of c' by the first three, of h' by the last
    parts = slopes.view(*g.shape[:2], 4, width)
    by_sigmoid.grad_input(new, i, grad_input=parts[:, :, 0])
    by_sigmoid.grad_input(cells[:-1], f, grad_input=parts[:, :, 1])
    by_tanh.grad_input(i, new, grad_input=parts[:, :, 2])
    by_sigmoid.grad_input(tanh, o, grad_input=parts[:, :, 3])
    flat, three, last = slopes.unbind(), parts[:, :, :3].unbind(), parts[:, :, 3].unbind()
    steps, shut = g.unbind(), through.unbind()
    dh = dh + steps[-1]
    for t in reversed(range(len(g))):
        dc = torch.addcmul(dc, dh, shut[t])
        three[t].mul_(dc[:, None])
        last[t].mul_(dh)
        dc.mul_(forget[t])
        dh = product(flat[t], turned, more=steps[t - 1] if t else None)
    return slopes, slopes, dh, dc


def _gru(
    a: torch.Tensor,
    b: torch.Tensor,
    before: torch.Tensor,
    turned: torch.Tensor,
    g: torch.Tensor,
    dh: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Run back n = tanh(a_n + r b_n) and h' = (1 - z) n + z h."""
    (ar, az, an), (br, bz, bn) = a.chunk(3, 2), b.chunk(3, 2)
    r, z = (ar + br).sigmoid_(), (az + bz).sigmoid_()
    n = _tanh(torch.addcmul(an, r, bn))
    by_n = (1 - z) * (1 - n.square())
    by_r, by_z = by_n * bn * r * (1 - r), (before - n) * z * (1 - z)
    right = torch.cat([by_r, by_z, by_n * r], 2)
    left = torch.empty_like(a)
    flat, parts = right.unbind(), right.view(*g.shape[:2], 3, -1).unbind()
    kept, new, steps = z.unbind(), by_n.unbind(), g.unbind()
    dh = dh + steps[-1]
    for t in reversed(range(len(g))):
        parts[t].mul_(dh[:, None])
        new[t].mul_(dh)
        dh = dh * kept[t] if t == 0 else torch.addcmul(steps[t - 1], dh, kept[t])
        dh = product(flat[t], turned, more=dh)
    width = by_n.shape[2]
    left[:, :, : 2 * width], left[:, :, 2 * width :] = right[:, :, : 2 * width], by_n
    return left, right, dh


def _plain(
    slope: torch.Tensor, turned: torch.Tensor, g: torch.Tensor, dh: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Run back h' = tanh or ReLU of the sum of the products, of this slope."""
    own, steps = slope.unbind(), g.unbind()
    dh = dh + steps[-1]
    for t in reversed(range(len(g))):
        own[t].mul_(dh)
        dh = product(own[t], turned, more=steps[t - 1] if t else None)
    return slope, slope, dh


def _tanh(x: torch.Tensor) -> torch.Tensor:
    """Return tanh x = 2 sigmoid(2 x) - 1, to an absolute 2^-23 in float32.

    torch's own takes ten times as long as its sigmoid: 0.54 ms, not 0.06, for 2^18 numbers.
    """
    return (2 * x).sigmoid_().mul_(2).sub_(1)


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float32 if it has a narrower type, as under autocast."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
