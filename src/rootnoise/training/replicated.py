"""Parameters that one process, or every rank of a data-parallel run, holds whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from opacus.grad_sample import AbstractGradSampleModule

from rootnoise._check import RootnoiseError
from rootnoise.training.clipping import Clip, clipped_sums
from rootnoise.training.ranks import Ranks


class Copies:
    """Per-sample gradients by Opacus; one sum over the ranks, to which each adds its noise.

    A rank makes the noise of its own part of the flattened parameters, so noise is added once,
    needs no traffic, and takes 1/size of the time and memory.

    Attributes:
        ranks: which hold the copies.
        spans: this rank's part of the noise.
    """

    def __init__(self, module: AbstractGradSampleModule, ranks: Ranks) -> None:
        self.ranks, self._module = ranks, module
        self._parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._sizes = [p.numel() for p in self._parameters.values()]
        self._span = ranks.span(sum(self._sizes))
        self.spans = [self._span]

    def begin(self) -> None:
        """Take over the weights and buffers of rank 0."""
        with torch.no_grad():
            self.ranks.copy_first_([*self._module.parameters(), *self._module.buffers()])

    def check(self, rows: int) -> None:
        """Refuse gradients that one backward of `rows` examples would not have left."""
        for name, p in self._parameters.items():
            g = getattr(p, "grad_sample", None)
            if isinstance(g, list):
                raise RootnoiseError(f"backward must run once a step, got {len(g)} for {name}")
            if g is None and rows:
                raise RootnoiseError(
                    f"per-sample gradients of {name} are missing: run forward and backward once, "
                    "in training mode, through all trainable parameters (evaluate under no_grad)"
                )
            found = 0 if g is None else len(g)
            if found != rows:
                raise RootnoiseError(f"indices must be one a gradient row ({found}), got {rows}")

    def noised_sum(
        self, rows: int, noise: torch.Tensor, clip: Clip, t: int
    ) -> tuple[torch.Tensor, int]:
        """Return the whole batch's clipped sum plus noise, flattened, float64; and the bad rows.

        In whole units no rank's rounding depends on the others' examples, though the noise is in.
        """
        gradients = [
            p.grad_sample.flatten(1) if rows else p.new_zeros(0, p.numel())
            for p in self._parameters.values()
        ]
        sums, bad = clipped_sums([g.float() for g in gradients], clip, t)
        total = torch.cat([clipped.to(sums[0].device) for clipped in sums])
        own = slice(*self._span)
        total[own] = clip.noised(total[own], noise)
        self.ranks.add_(total)
        return total * clip.grid, bad

    def write(self, mean: torch.Tensor) -> None:
        """Make `mean` the gradient of the parameters, and drop the per-sample gradients."""
        parts = torch.split(mean, self._sizes)
        for p, part in zip(self._parameters.values(), parts, strict=True):
            p.grad = part.view_as(p).to(p.device, p.dtype)
            p.grad_sample = None

    def save(self, rows: torch.Tensor, most: int) -> torch.Tensor:
        """Return the noise rows of all ranks, in the columns of the flattened parameters."""
        return self.ranks.columns(rows, sum(self._sizes))

    def load(self, name: str, saved: Any, n_rows: int) -> torch.Tensor:
        """Return this rank's columns of saved rows, or refuse another layout."""
        size = sum(self._sizes)
        if not isinstance(saved, torch.Tensor) or saved.shape[1:] != (size,):
            got = tuple(saved.shape) if isinstance(saved, torch.Tensor) else saved
            rule = f"saved noise's {name} must be a tensor of {size} columns"
            raise RootnoiseError(f"{rule}, got {got!r:.80}")
        return saved[:, slice(*self._span)]

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the state of the inner optimizer."""
        return optimizer.state_dict()

    def load_optimizer_state(
        self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
    ) -> None:
        """Restore the state of the inner optimizer."""
        optimizer.load_state_dict(dict(state))
