"""Linear layers: an example's weight gradient is a sum over its tokens of g_t a_t^T."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from rootnoise.training.clip.bounds import (
    CACHED,
    GRAM,
    HELD,
    KEPT,
    SMALL,
    Space,
    Sum,
    add_each_,
    add_outer_,
    add_rows_,
    example_blocks,
    gram_squares,
    row_squares,
    single,
)
from rootnoise.training.clip.taps import Taps


class Products:
    """Layers whose weight gradient is a sum over tokens of g_t a_t^T, and bias gradient of g_t."""

    groups = 1

    def __init__(
        self,
        module: Any,
        trainable: Sequence[str],
        transposed: bool = False,
        argument: str = "input",
    ) -> None:
        self.names = [argument]
        self.module, self.transposed = module, transposed
        self.weight, self.bias = "weight" in trainable, "bias" in trainable
        self.space = Space()

    def tokens(self, taps: Taps) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and output gradients as (examples, groups, tokens, width)."""
        (a,), g = taps[0].values(), taps[1]
        size = (len(g), 1, -1)
        return widened(a).reshape(*size, a.shape[-1]), widened(g).reshape(*size, g.shape[-1])

    def shape(self, g: torch.Tensor) -> tuple[int, int, int]:
        """Return tokens, d_in and d_out of a call."""
        d_in, d_out = self._widths()
        return max(1, g[0].numel() // (self.groups * d_out)) if len(g) else 1, d_in, d_out

    def _widths(self) -> tuple[int, int]:
        d_out, d_in = self.module.weight.shape
        return (d_out, d_in) if self.transposed else (d_in, d_out)

    def small(self, taps: Sequence[Taps]) -> bool:
        """See `Row`."""
        if not self.weight:
            return True
        d_in, d_out = self._widths()
        tokens = self.length(taps)
        if d_in + d_out + tokens**2 > GRAM:  # not certified
            return True
        sooner = d_in * d_out <= SMALL and all(self.singly(*one) for one in taps)
        return d_in * d_out <= (KEPT if sooner else 1) * tokens * (d_in + d_out)

    def singly(self, inputs: dict[str, torch.Tensor], g: torch.Tensor) -> bool:
        """Return whether, if taps are kept, each example's array is made when it is added.

        It must not depend on the number of examples, or one of them would decide how the others
        are measured.
        """
        (a,) = inputs.values()
        return single(widened(a), widened(g), self.shape(g)[0])

    def twice(self, taps: Taps) -> bool:
        """Return whether arrays that `small` asks for exceed their taps, and `HELD` in all."""
        tokens, d_in, d_out = self.shape(taps[1])
        many = len(taps[1]) * self.groups * d_in * d_out > HELD
        return self.weight and many and d_in * d_out > tokens * (d_in + d_out)

    def length(self, taps: Sequence[Taps]) -> int:
        """See `Row`."""
        return sum(self.shape(g)[0] for _, g in taps)

    def blocks(self, taps: Taps) -> Iterator[slice]:
        """Yield the examples whose arrays are made at once."""
        tokens, d_in, d_out = self.shape(taps[1])
        return example_blocks(len(taps[1]), 1, self.groups * tokens * (d_in + d_out), CACHED)

    def per_sample(self, taps: Taps) -> dict[str, torch.Tensor]:
        """See `Row`."""
        inputs, g = taps
        n, (_, d_in, d_out) = len(g), self.shape(g)
        made = {}
        if self.bias:
            made["bias"] = self.bias_gradient(widened(g))
        if self.weight:
            size = (d_in, d_out) if self.transposed else (d_out, d_in)
            rows = self.space.take([n, self.groups, *size], widened(g).dtype, g.device)
            for part in self.blocks(taps):
                a, b = self.tokens(({k: x[part] for k, x in inputs.items()}, g[part]))
                left, right = (a, b) if self.transposed else (b, a)
                torch.matmul(left.mT, right, out=rows[part])
            made["weight"] = rows.flatten(1)
        return made

    def bias_gradient(self, g: torch.Tensor) -> torch.Tensor:
        """Return the bias's gradients, (examples, size)."""
        return g.reshape(len(g), -1, g.shape[-1]).sum(1)

    def maker(self, a: torch.Tensor, g: torch.Tensor) -> Callable[[int, torch.dtype], torch.Tensor]:
        """Return what makes the weight gradient of one of these examples, in a dtype."""
        left, right = (a, g) if self.transposed else (g, a)

        def make(i: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.bmm(left[i].to(dtype).mT, right[i].to(dtype))

        return make

    def kept(self, taps: Sequence[Taps]) -> KeptProducts:
        """See `Row`."""
        return KeptProducts(self, taps)


class KeptProducts:
    """Norms by Gram matrices; the sum as one float64 product, or float32 ones of each example."""

    def __init__(self, row: Products, taps: Sequence[Taps]) -> None:
        self.row, self.taps = row, taps
        self.tokens = row.length(taps)
        self._found = torch.empty(0)  # what `squares` has returned

    def _blocks(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        n = len(self.taps[0][1])
        _, d_in, d_out = self.row.shape(self.taps[0][1])
        for part in example_blocks(n, self.tokens, self.row.groups * (d_in + d_out)):
            made = [
                self.row.tokens(({k: x[part] for k, x in inputs.items()}, g[part]))
                for inputs, g in self.taps
            ]
            a, g = made[0]
            if len(made) > 1:
                a, g = (torch.cat(parts, 2) for parts in zip(*made, strict=True))
            yield part, a, g

    def squares(self) -> torch.Tensor:
        """See `Kept`."""
        row = self.row
        found = [gram_squares(a, g, row.weight, row.bias) for _, a, g in self._blocks()]
        self._found = torch.cat(found)
        return self._found

    def add_made_(
        self,
        sums: dict[str, Sum],
        make: Callable[[int, torch.dtype], torch.Tensor],
        bias: torch.Tensor | None,
        scale: torch.Tensor,
        part: slice = slice(None),
    ) -> None:
        """Add the arrays of a part of the examples one by one, as `add_each_`."""
        own = add_each_(sums["weight"], make, bias, scale, self._found[part])
        if bias is not None:
            add_rows_(sums["bias"], bias.masked_fill(own[:, None] == 0, 0), own)

    def add_(self, sums: dict[str, Sum], scale: torch.Tensor, bad: torch.Tensor | None) -> None:
        """See `Kept`."""
        row = self.row
        for part, inputs, outputs in self._blocks():
            a, g = inputs, outputs
            if row.weight and single(a, g, g.shape[2]):
                bias = g.sum(2).flatten(1) if row.bias else None
                self.add_made_(sums, row.maker(a, g), bias, scale[part], part)
                continue
            if bad is not None:
                a, g = (x.masked_fill(bad[part, None, None, None], 0) for x in (a, g))
            if row.weight:
                left, right = (g, a) if row.transposed else (a, g)
                add_outer_(sums["weight"], left, right, scale[part])
            if row.bias:
                add_rows_(sums["bias"], g.double().sum(2).flatten(1), scale[part])


class MadeTwice:
    """One call whose arrays are made for their norms, and again when they are added.

    By the same calls, and by those that make them where they are held. So the number of examples
    decides where an array lies, and not what it is.
    """

    tokens = 1

    def __init__(self, row: Products, taps: Taps) -> None:
        self.row, self.taps = row, taps

    def _blocks(self) -> Iterator[tuple[slice, dict[str, torch.Tensor]]]:
        inputs, g = self.taps
        for part in self.row.blocks(self.taps):
            own = {name: x[part] for name, x in inputs.items()}
            yield part, self.row.per_sample((own, g[part]))
            self.row.space.free()

    def squares(self) -> torch.Tensor:
        """See `Kept`."""
        found = [[row_squares(x) for x in made.values()] for _, made in self._blocks()]
        return torch.cat([torch.stack(each).sum(0) for each in found])

    def add_(self, sums: dict[str, Sum], scale: torch.Tensor, bad: torch.Tensor | None) -> None:
        """See `Kept`."""
        for part, made in self._blocks():
            for name, rows in made.items():
                own = rows if bad is None else rows.masked_fill(bad[part, None], 0)
                add_rows_(sums[name], own, scale[part])


def widened(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float32 if it has a narrower type, as under autocast.

    >>> widened(torch.ones(2, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
