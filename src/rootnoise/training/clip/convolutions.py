"""Convolutions: a token is an output position, and its input is the window that it sees.

Windows overlap: as an array they are as many times larger than the input as the kernel has places.
Two of the three things that need them do without. Gram matrices of windows are sums of entries of
those of pixels, and weight gradients are convolutions of the library's own, of one example each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rootnoise.training.clip.bounds import (
    CACHED,
    Sum,
    add_product_,
    add_rows_,
    example_blocks,
    gram_squares,
)
from rootnoise.training.clip.products import KeptProducts, Products, widened
from rootnoise.training.clip.taps import Taps

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Convolution(Products):
    """Conv1d to Conv3d."""

    def __init__(self, module: Any, trainable: Sequence[str]) -> None:
        super().__init__(module, trainable)
        self.groups = module.groups

    def _widths(self) -> tuple[int, int]:
        weight = self.module.weight  # of which FSDP2 would gather weight[0], on this rank alone
        return weight.numel() // len(weight), len(weight) // self.groups

    def padded(self, a: torch.Tensor) -> torch.Tensor:
        """Return inputs with the border that the layer puts around them."""
        m = self.module
        mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
        return functional.pad(widened(a), m._reversed_padding_repeated_twice, mode=mode)

    def tokens(self, taps: Taps) -> tuple[torch.Tensor, torch.Tensor]:
        """Return windows and output gradients as (examples, groups, places, width)."""
        (a,), g = taps[0].values(), taps[1]
        windows = self.windows(self.padded(a), g.shape[2:])
        # Places last: copying contiguous runs takes half the time of copying single numbers.
        windows = windows.flatten(2, 2 + len(self.module.kernel_size)).flatten(3).mT
        return windows, self.outputs(g)

    def windows(self, a: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
        """Return a view of padded inputs, (examples, groups, channels, *kernel, *places)."""
        m = self.module
        a = a.reshape(len(a), self.groups, -1, *a.shape[2:])
        strides, inner = a.stride()[:3], a.stride()[3:]
        steps = [s * x for s, x in zip(m.stride, inner, strict=True)]
        holes = [d * x for d, x in zip(m.dilation, inner, strict=True)]
        size = (*a.shape[:3], *m.kernel_size, *places)
        return a.as_strided(size, (*strides, *holes, *steps))

    def outputs(self, g: torch.Tensor) -> torch.Tensor:
        """Return output gradients as (examples, groups, places, width)."""
        return widened(g).reshape(len(g), self.groups, g.shape[1] // self.groups, -1).mT

    def blocks(self, taps: Taps) -> Iterator[slice]:
        """Yield the examples whose arrays are made at once."""
        (a,), g = taps[0].values(), taps[1]
        if not self._convolves(a):
            return super().blocks(taps)
        return example_blocks(len(g), 1, self._width(taps), CACHED)

    def _convolves(self, a: torch.Tensor) -> bool:
        return self.weight and a.device.type == "cpu"  # not measured on GPUs

    def _width(self, taps: Taps) -> int:
        """Return the numbers of an example, of inputs, output gradients and array."""
        (a,), g = taps[0].values(), taps[1]
        return int(a[0].numel() + g[0].numel() + self.module.weight.numel())

    def per_sample(self, taps: Taps) -> dict[str, torch.Tensor]:
        """See `Row`: by the library's convolutions, in which each example has groups of its own.

        How many examples one call takes depends on the layer's shape alone. An example's array
        depends neither on the number of examples nor on who they are: where a call takes several,
        a single one gets an empty one beside it, since without groups another program runs.
        """
        (a,), g = taps[0].values(), taps[1]
        if not self._convolves(a):
            return super().per_sample(taps)
        made = {"bias": self.bias_gradient(widened(g))} if self.bias else {}
        padding: Any = self.module.padding
        if self.module.padding_mode != "zeros" or isinstance(padding, str):
            a, padding = self.padded(a), (0,) * (a.dim() - 2)
        rows = self.space.take([len(g), self.module.weight.numel()], widened(g).dtype, g.device)
        width = self._width(taps)
        for part in self.blocks(taps):
            x, y = widened(a[part]), widened(g[part])
            if len(x) == 1 and 2 * width <= CACHED:
                x, y = (torch.cat([t, torch.zeros_like(t)]) for t in (x, y))
            rows[part] = self.weight_gradient(x, y, padding)[: len(rows[part])]
        return made | {"weight": rows}

    def weight_gradient(
        self, a: torch.Tensor, g: torch.Tensor, padding: Sequence[int]
    ) -> torch.Tensor:
        """Return the weight gradients of these examples, (examples, size), in one call."""
        n, m = len(a), self.module
        _, made, _ = torch.ops.aten.convolution_backward(
            g.reshape(1, -1, *g.shape[2:]),
            a.reshape(1, -1, *a.shape[2:]),
            g.new_empty(n * len(m.weight), *m.weight.shape[1:]),  # only its shape is read
            None,
            m.stride,
            padding,
            m.dilation,
            False,
            (0,) * len(m.kernel_size),
            n * self.groups,
            (False, True, False),
        )
        found: torch.Tensor = made.reshape(n, -1)
        return found

    def bias_gradient(self, g: torch.Tensor) -> torch.Tensor:
        """See `Products`."""
        return g.flatten(2).sum(2)

    def kept(self, taps: Sequence[Taps]) -> KeptProducts:
        """See `Row`."""
        return KeptProducts(self, taps) if len(taps) > 1 else KeptConvolution(self, taps)


class KeptConvolution(KeptProducts):
    """One call of a convolution: norms by Gram matrices of pixels where these are smaller."""

    row: Convolution

    def squares(self) -> torch.Tensor:
        """See `Kept`."""
        row, ((inputs, g),) = self.row, self.taps
        (a,) = inputs.values()
        size = row.padded(a[:1]).shape[2:]
        pixels, (tokens, d_in, d_out) = math.prod(size), row.shape(g)
        channels = a.shape[1] // row.groups
        if tokens == 1 or pixels**2 * channels >= tokens**2 * d_in or not row.weight:
            return super().squares()
        found = []
        width = row.groups * (channels + d_out + pixels)
        for part in example_blocks(len(g), pixels, width):
            x = row.padded(a[part]).reshape(len(g[part]), row.groups, channels, pixels).mT
            fold = self._fold(size, g.shape[2:])
            found.append(gram_squares(x, row.outputs(g[part]), True, row.bias, fold))
        self._found = torch.cat(found)
        return self._found

    def _fold(
        self, size: Sequence[int], places: Sequence[int]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return what makes Gram matrices of windows of those of pixels.

        a_t . a_u is the sum, over the kernel's places o, of the products of pixels t + o and u + o.
        """
        m, pixels = self.row.module, math.prod(size)
        steps = [math.prod(size[i + 1 :]) for i in range(len(size))]
        rows = [s * x for s, x in zip(m.stride, steps, strict=True)]
        holes = [d * x * (pixels + 1) for d, x in zip(m.dilation, steps, strict=True)]

        def fold(gram: torch.Tensor) -> torch.Tensor:
            gram = gram.contiguous()
            total = gram.new_zeros(*gram.shape[:2], *places, *places)
            strides = *gram.stride()[:2], *(pixels * x for x in rows), *rows
            for place in itertools.product(*(range(k) for k in m.kernel_size)):
                start = sum(k * x for k, x in zip(place, holes, strict=True))
                total += gram.as_strided(total.shape, strides, gram.storage_offset() + start)
            return total.flatten(2, 1 + len(size)).flatten(3)

        return fold

    def add_(self, sums: dict[str, Sum], scale: torch.Tensor, bad: torch.Tensor | None) -> None:
        """See `Kept`."""
        row, ((inputs, g),) = self.row, self.taps
        a, g = row.padded(*inputs.values()), widened(g)
        if not row.weight:
            super().add_(sums, scale, bad)
        elif row.singly(inputs, g):
            bias = row.bias_gradient(g) if row.bias else None
            none = (0,) * len(row.module.kernel_size)

            def make(i: int, dtype: torch.dtype) -> torch.Tensor:
                x, y = (t[i : i + 1].to(dtype) for t in (a, g))
                return row.weight_gradient(x, y, none)

            self.add_made_(sums, make, bias, scale)
        else:
            self._add_products(sums, a, g, scale, bad)

    def _add_products(
        self,
        sums: dict[str, Sum],
        a: torch.Tensor,
        g: torch.Tensor,
        scale: torch.Tensor,
        bad: torch.Tensor | None,
    ) -> None:
        """Add one float64 product of all windows, which are written once, in its own order."""
        row = self.row
        tokens, d_in, d_out = row.shape(g)
        for part in example_blocks(len(g), tokens, row.groups * (d_in + d_out)):
            x, y = a[part].double(), row.outputs(g[part]).double()
            if bad is not None:
                none = bad[part].nonzero().flatten()
                x, y = (t.index_fill(0, none, 0) for t in (x, y))
            windows = row.windows(x, g.shape[2:]).movedim(0, -1 - len(g.shape[2:]))
            right = windows.reshape(row.groups, d_in, -1)  # the one copy of them
            left = (y * scale[part, None, None, None]).permute(1, 3, 0, 2).flatten(2)
            add_product_(sums["weight"], left, right.mT)
            if row.bias:
                add_rows_(sums["bias"], y.sum(2).flatten(1), scale[part])
