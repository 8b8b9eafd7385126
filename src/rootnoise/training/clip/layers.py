"""One table of layers: a certified norm of each example's gradient, and the clipped sum.

| row | layers | norm |
|---|---|---|
| `Products` | Linear, Conv1d-3d, Hugging Face's Conv1D | Gram matrices or the gradient itself |
| `Lookups` | Embedding, EmbeddingBag | the gradient itself, of the rows looked up |
| `Scales` | LayerNorm, GroupNorm, InstanceNorm, RMSNorm | the gradient itself |

A call's taps are its inputs and output gradients. If the gradient itself is no larger,
d_in d_out <= T (d_in + d_out), it is computed and replaces them. Otherwise Gram matrices are
cheaper: T <= d_in d_out / (d_in + d_out) implies 2 T^2 <= d_in d_out / 2, since
(d_in + d_out)^2 >= 4 d_in d_out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from rootnoise.training.clip.bounds import (
    CACHED,
    GRAM,
    Sum,
    add_each_,
    add_outer_,
    add_rows_,
    example_blocks,
    gram_squares,
    row_squares,
    single,
)

Taps = tuple[dict[str, torch.Tensor], torch.Tensor]  # a call's inputs by name, output gradient


class Row(Protocol):
    """A row of the table: how norms and sums of one layer are computed."""

    @property
    def names(self) -> Sequence[str]:
        """Return the names of the forward's arguments."""

    def small(self, taps: Sequence[Taps]) -> bool:
        """Return whether the per-sample gradients are no larger than the taps of these calls."""

    def length(self, taps: Sequence[Taps]) -> int:
        """Return an example's number of tokens over these calls, whose products are added up."""

    def per_sample(self, taps: Taps) -> dict[str, torch.Tensor]:
        """Return each trainable parameter's gradients, (examples, size)."""

    def kept(self, taps: Sequence[Taps]) -> Kept:
        """Return what is kept of several calls, to compute norms and sums of their total."""


class Kept(Protocol):
    """The calls of one layer in a micro-batch; its gradient is their sum.

    Attributes:
        tokens: number of tokens per example, whose products are added up.
    """

    tokens: int

    def squares(self) -> torch.Tensor:
        """Return an upper bound on each example's squared norm, float64."""

    def add_(self, sums: dict[str, Sum], scale: torch.Tensor, bad: torch.Tensor | None) -> None:
        """Add the scaled sums, by parameter name; `bad` examples count as zero."""


def row_of(module: nn.Module, trainable: Sequence[str]) -> Row | None:
    """Return the table's row for a layer with these trainable parameters, if there is one."""
    kind = type(module)
    if kind in CONVOLUTIONS:
        return Convolution(module, trainable)
    if isinstance(module, nn.Linear) and kind.forward is nn.Linear.forward:
        return Products(module, trainable)
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        return Products(module, trainable, transposed=True, argument="x")
    if kind is nn.Embedding:
        return Lookups(module)
    if kind is nn.EmbeddingBag and module.mode != "max":
        return BagLookups(module)
    if kind in SCALES:
        return Scales(module, trainable)
    return None


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

    def tokens(self, taps: Taps) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and output gradients as (examples, groups, tokens, width)."""
        (a,), g = taps[0].values(), taps[1]
        size = (len(g), 1, -1)
        return _real(a).reshape(*size, a.shape[-1]), _real(g).reshape(*size, g.shape[-1])

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
        uncertified = d_in + d_out + tokens**2 > GRAM
        return uncertified or d_in * d_out <= tokens * (d_in + d_out)

    def length(self, taps: Sequence[Taps]) -> int:
        """See `Row`."""
        return sum(self.shape(g)[0] for _, g in taps)

    def per_sample(self, taps: Taps) -> dict[str, torch.Tensor]:
        """See `Row`."""
        inputs, g = taps
        n, (tokens, d_in, d_out) = len(g), self.shape(g)
        made = {}
        if self.bias:
            made["bias"] = self.bias_gradient(_real(g))
        if self.weight:
            rows = g.new_empty(n, self.groups, d_out, d_in, dtype=_real(g).dtype)
            if self.transposed:
                rows = rows.mT.contiguous()
            for part in example_blocks(n, 1, self.groups * tokens * (d_in + d_out), CACHED):
                a, b = self.tokens(({k: x[part] for k, x in inputs.items()}, g[part]))
                left, right = (a, b) if self.transposed else (b, a)
                torch.matmul(left.mT, right, out=rows[part])
            made["weight"] = rows.flatten(1)
        return made

    def bias_gradient(self, g: torch.Tensor) -> torch.Tensor:
        """Return the bias's gradients, (examples, size)."""
        return g.reshape(len(g), -1, g.shape[-1]).sum(1)

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

    def add_(self, sums: dict[str, Sum], scale: torch.Tensor, bad: torch.Tensor | None) -> None:
        """See `Kept`."""
        row = self.row
        for part, inputs, outputs in self._blocks():
            a, g = inputs, outputs
            if row.weight and single(a, g):
                left, right = (g, a) if row.transposed else (a, g)
                bias = g.sum(2).flatten(1) if row.bias else None
                own = add_each_(sums["weight"], left, right, bias, scale[part], self._found[part])
                if bias is not None:
                    add_rows_(sums["bias"], bias.masked_fill(own[:, None] == 0, 0), own)
                continue
            if bad is not None:
                a, g = (x.masked_fill(bad[part, None, None, None], 0) for x in (a, g))
            if row.weight:
                left, right = (g, a) if row.transposed else (a, g)
                add_outer_(sums["weight"], left, right, scale[part])
            if row.bias:
                add_rows_(sums["bias"], g.double().sum(2).flatten(1), scale[part])


class Convolution(Products):
    """Conv1d to Conv3d: a token is an output position, and its input is the window that it sees."""

    def __init__(self, module: Any, trainable: Sequence[str]) -> None:
        super().__init__(module, trainable)
        self.groups = module.groups

    def _widths(self) -> tuple[int, int]:
        weight = self.module.weight
        return weight[0].numel(), weight.shape[0] // self.groups

    def tokens(self, taps: Taps) -> tuple[torch.Tensor, torch.Tensor]:
        """Return windows and output gradients as (examples, groups, places, width)."""
        (a,), g, m = taps[0].values(), taps[1], self.module
        n, dims = len(a), len(m.kernel_size)
        mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
        a = functional.pad(_real(a), m._reversed_padding_repeated_twice, mode=mode)
        a = a.reshape(len(a), self.groups, -1, *a.shape[2:])
        strides, inner = a.stride()[:3], a.stride()[3:]
        size = (*a.shape[:3], *m.kernel_size, *g.shape[2:])
        steps = [s * x for s, x in zip(m.stride, inner, strict=True)]
        holes = [d * x for d, x in zip(m.dilation, inner, strict=True)]
        windows = a.as_strided(size, (*strides, *holes, *steps))
        # Places last: copying contiguous runs takes half the time of copying single numbers.
        windows = windows.flatten(2, 2 + dims).flatten(3).mT
        return windows, _real(g).reshape(n, self.groups, g.shape[1] // self.groups, -1).mT

    def per_sample(self, taps: Taps) -> dict[str, torch.Tensor]:
        """See `Row`: one convolution on a CPU, in which each example has groups of its own.

        Windows need not be copied: half the time for 32 channels of 14 x 14 places. An example's
        array depends neither on the number of examples nor on their threads, except that of a
        single one, which gets an empty one beside it.
        """
        (a,), g = taps[0].values(), taps[1]
        if not self.weight or a.device.type != "cpu":  # not measured on GPUs
            return super().per_sample(taps)
        made = {"bias": self.bias_gradient(_real(g))} if self.bias else {}
        rows = g.new_empty(len(g), self.module.weight.numel(), dtype=_real(g).dtype)
        for part in example_blocks(len(g), 1, a[0].numel() + g[0].numel() + rows.shape[1]):
            rows[part] = self._weight_gradient(_real(a[part]), _real(g[part]))
        return made | {"weight": rows}

    def _weight_gradient(self, a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        n, m = len(a), self.module
        padding = m.padding
        if m.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
            a = functional.pad(a, m._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(m.kernel_size)
        if n == 1:
            a, g = (torch.cat([x, torch.zeros_like(x)]) for x in (a, g))
        _, made, _ = torch.ops.aten.convolution_backward(
            g.reshape(1, -1, *g.shape[2:]),
            a.reshape(1, -1, *a.shape[2:]),
            g.new_empty(len(g) * len(m.weight), *m.weight.shape[1:]),  # only its shape is read
            None,
            m.stride,
            padding,
            m.dilation,
            False,
            (0,) * len(m.kernel_size),
            len(g) * self.groups,
            (False, True, False),
        )
        return made.reshape(len(g), -1)[:n]

    def bias_gradient(self, g: torch.Tensor) -> torch.Tensor:
        """See `Products`."""
        return g.flatten(2).sum(2)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Lookups:
    """Embedding: an example's gradient is zero except in the rows that it looks up."""

    names: Sequence[str] = ("input",)

    def __init__(self, module: Any) -> None:
        self.module = module

    def small(self, taps: Sequence[Taps]) -> bool:
        """See `Row`: never, since only rows that are looked up take memory."""
        return False

    def length(self, taps: Sequence[Taps]) -> int:
        """See `Row`: nothing is multiplied."""
        return 1

    def per_sample(self, taps: Taps) -> dict[str, torch.Tensor]:
        """See `Row`."""
        kept, weight = self.kept([taps]), self.module.weight
        made = kept.rows.new_zeros(len(taps[1]), *weight.shape)
        made[kept.owners, kept.ids] = kept.rows
        return {"weight": made.flatten(1)}

    def found(self, taps: Taps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return for each token its example, its row in the embedding, and that row's gradient."""
        (ids,), g = taps[0].values(), taps[1]
        owners = torch.arange(len(g), device=g.device)[:, None].expand(len(g), ids[0].numel())
        return owners.flatten(), ids.flatten(), _real(g).flatten(0, -2)

    def kept(self, taps: Sequence[Taps]) -> KeptLookups:
        """See `Row`."""
        owners, ids, g = (torch.cat(x) for x in zip(*(self.found(t) for t in taps), strict=True))
        if self.module.padding_idx is not None:
            used = ids != self.module.padding_idx
            owners, ids, g = owners[used], ids[used], g[used]
        size = len(self.module.weight)
        keys, place = torch.unique(owners * size + ids, return_inverse=True)
        rows = g.new_zeros(len(keys), g.shape[1]).index_add_(0, place, g)
        return KeptLookups(len(taps[0][1]), keys // size, keys % size, rows)


class KeptLookups:
    """Gradients of the rows looked up: the example, the row of the embedding, the gradient."""

    tokens = 1

    def __init__(self, n: int, owners: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> None:
        self.n, self.owners, self.ids, self.rows = n, owners, ids, rows

    def squares(self) -> torch.Tensor:
        """See `Kept`."""
        total = self.rows.new_zeros(self.n, dtype=torch.float64)
        return total.index_add_(0, self.owners, row_squares(self.rows))

    def add_(self, sums: dict[str, Sum], scale: torch.Tensor, bad: torch.Tensor | None) -> None:
        """See `Kept`."""
        rows = self.rows
        if bad is not None:
            rows = rows.masked_fill(bad[self.owners, None], 0)
        table = sums["weight"].whole().view(-1, rows.shape[1])
        table.index_add_(0, self.ids, rows.double() * scale[self.owners, None])


class BagLookups(Lookups):
    """EmbeddingBag: an example is a bag whose rows are summed or averaged."""

    names = ("input", "offsets", "per_sample_weights")

    def found(self, taps: Taps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Lookups`."""
        inputs, g = taps
        ids, n = inputs["input"], len(g)
        if ids.dim() == 2:
            owners = torch.arange(n, device=g.device)[:, None].expand_as(ids).flatten()
        else:
            starts = inputs["offsets"][:n].contiguous()
            places = torch.arange(len(ids), device=g.device)
            owners = torch.searchsorted(starts, places.to(starts.dtype), right=True) - 1
        ids, rows = ids.flatten(), _real(g)[owners]
        if self.module.mode == "mean":
            skipped = self.module.padding_idx
            counted = torch.ones_like(ids) if skipped is None else (ids != skipped).long()
            length = torch.zeros(n, dtype=torch.long, device=g.device)
            length.index_add_(0, owners, counted)
            rows = rows / length.clamp(min=1)[owners, None]
        if "per_sample_weights" in inputs:
            rows = rows * inputs["per_sample_weights"].flatten()[:, None]
        return owners, ids, rows


class Scales:
    """Layers that normalise and then scale: their gradients are as small as those of a bias."""

    names: Sequence[str] = ("input",)

    def __init__(self, module: Any, trainable: Sequence[str]) -> None:
        self.module, self.trainable = module, trainable

    def small(self, taps: Sequence[Taps]) -> bool:
        """See `Row`: always."""
        return True

    def length(self, taps: Sequence[Taps]) -> int:
        """See `Row`: never kept."""
        return 1

    def per_sample(self, taps: Taps) -> dict[str, torch.Tensor]:
        """See `Row`."""
        (a,), g, m = taps[0].values(), _real(taps[1]), self.module
        n, a = len(g), _real(a)
        made = {}
        if "bias" in self.trainable:
            made["bias"] = self._reduced(g)
        if "weight" in self.trainable:
            if isinstance(m, nn.LayerNorm):
                plain = functional.layer_norm(a, m.normalized_shape, None, None, m.eps)
            elif isinstance(m, nn.RMSNorm):
                plain = functional.rms_norm(a, m.normalized_shape, None, m.eps)
            elif isinstance(m, nn.GroupNorm):
                plain = functional.group_norm(a, m.num_groups, None, None, m.eps)
            else:
                plain = functional.instance_norm(a, eps=m.eps)
            made["weight"] = self._reduced(g * plain)
        return {name: x.reshape(n, -1) for name, x in made.items()}

    def _reduced(self, g: torch.Tensor) -> torch.Tensor:
        """Return the sum over the places that share a parameter."""
        if isinstance(self.module, nn.LayerNorm | nn.RMSNorm):
            size = len(self.module.normalized_shape)
            return g.reshape(len(g), -1, *g.shape[g.dim() - size :]).sum(1)
        return g.reshape(*g.shape[:2], -1).sum(2)

    def kept(self, taps: Sequence[Taps]) -> Kept:
        """See `Row`: never called."""
        raise NotImplementedError


SCALES = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


def _real(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float32 if it has a narrower type, as under autocast."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
