"""One table of layers: a certified norm of each example's gradient, and the clipped sum.

| row | layers | norm |
|---|---|---|
| `Products` | Linear, Hugging Face's Conv1D | Gram matrices or the gradient itself |
| `Convolution` | Conv1d-3d | the same |
| `Lookups` | Embedding, EmbeddingBag | the gradient itself, of the rows looked up |
| `Scales` | LayerNorm, GroupNorm, InstanceNorm, RMSNorm | the gradient itself |

A call's taps are its inputs and output gradients. If the gradient itself is no larger,
d_in d_out <= T (d_in + d_out), it is computed and replaces them. Otherwise Gram matrices are
cheaper: T <= d_in d_out / (d_in + d_out) implies 2 T^2 <= d_in d_out / 2, since
(d_in + d_out)^2 >= 4 d_in d_out. Where each example's array is made anyway, to be added, a small
one is kept instead, up to a few times the size of its taps (`bounds.KEPT`): it saves the norm.
Where those of all examples are many (`bounds.HELD`), they are not kept but made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from rootnoise.training.clip.bounds import Sum, example_blocks, row_squares
from rootnoise.training.clip.convolutions import CONVOLUTIONS, Convolution
from rootnoise.training.clip.products import Products, widened
from rootnoise.training.clip.taps import Taps, is_replaced, kind_of


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
    if is_replaced(module):
        return None
    kind = kind_of(module)
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
        return owners.flatten(), ids.flatten(), widened(g).flatten(0, -2)

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
        ids, rows = ids.flatten(), widened(g)[owners]
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
        (a,), g = taps[0].values(), taps[1]
        # In blocks, whose memory is used again: fresh memory takes longer to touch than to fill.
        blocks = example_blocks(len(g), 1, 3 * g[0].numel())
        parts = [self._block(widened(a[part]), widened(g[part])) for part in blocks]
        return {name: torch.cat([made[name] for made in parts]) for name in parts[0]}

    def _block(self, a: torch.Tensor, g: torch.Tensor) -> dict[str, torch.Tensor]:
        m, n = self.module, len(g)
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
            made["weight"] = self._reduced(plain.mul_(g))
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
