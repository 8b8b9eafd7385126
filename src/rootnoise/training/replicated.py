"""Parameters that one process, or every rank of a data-parallel run, holds whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rootnoise._check import RootnoiseError
from rootnoise.training.clip import Flat, PrivateModule
from rootnoise.training.clipping import PART, Clip, warn_non_finite
from rootnoise.training.place import own_name
from rootnoise.training.ranks import KEPT, Ranks

# Largest fraction of the clip norm that rounding to the grid may cost: with 1e9 parameters and 1e6
# records it is 2e-5.
MOST_ROUNDING = 0.01


@dataclass(frozen=True)
class OnGrid(Flat):
    """`Flat`, with sums in units of the grid: by a power of two, so that no bit but that changes.

    >>> OnGrid(1.0, grid=0.25).factors(torch.tensor([[4.0, 0.25]]))
    tensor([[2.0000, 4.0000]])
    """

    grid: float = 1.0

    def factors(self, squares: torch.Tensor) -> torch.Tensor:
        """Return one factor per example, over the grid."""
        return super().factors(squares) / self.grid


def rule_within(clip: Clip, size: int) -> OnGrid:
    """Return the rule for sums of `size` numbers that are then rounded to the grid; see `Copies`.

    Raises:
        RootnoiseError: noise so large that its grid unit is not small beside the clip norm.
    """
    rounding = math.sqrt(size) * clip.grid
    if rounding > MOST_ROUNDING * clip.norm:
        raise RootnoiseError(
            "noise must leave float64 digits for the clip norm, got a grid of "
            f"{clip.grid:.2g} for clip_norm={clip.norm:.2g}: less noise, or fewer records"
        )
    return OnGrid(math.nextafter(clip.norm - rounding, 0), clip.grid)


class Copies:
    """Clipped sums by `training.clip`, added up over ranks that each add their part of the noise.

    A rank draws the noise of its own part of the flattened parameters, so noise is added once,
    needs no communication, and takes 1/size of the time and memory on each rank.

    A rank's sum S over its part of the batch is a float64 vector. One record changes it by at most
    C', the norm to which `Flat(C')` clips, rounding included (`clip.bounds`, theorem on
    sums). Each of its d numbers is then rounded by at most half a grid unit, so that the ranks'
    sums and the noise add up exactly, in any order. A record is on one rank only and changes the
    total by at most C' + sqrt(d) units, so C' is set to the clip norm minus sqrt(d) units.

    Attributes:
        ranks: the ranks that hold the copies.
        spans: this rank's part of the noise.

    Raises:
        RootnoiseError: as for `rule_within`.
    """

    whole = True
    doing = KEPT

    def __init__(self, module: PrivateModule, ranks: Ranks, clip: Clip) -> None:
        self.ranks, self._module, self._clip = ranks, module, clip
        self._parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._sizes = [p.numel() for p in self._parameters.values()]
        self._span = ranks.span(sum(self._sizes))
        self.spans = [self._span]
        self._rule = rule_within(clip, sum(self._sizes))
        self._dtype = widest(self._parameters.values())
        self._taken = 0  # number of examples whose gradients are in the sum

    def begin(self) -> None:
        """Adopt the weights and buffers of rank 0."""
        with torch.no_grad():
            self.ranks.copy_first_([*self._module.parameters(), *self._module.buffers()])

    def clear(self) -> None:
        """Drop gradients and their sum, but keep what a forward has saved for its backward."""
        self._module.restart()
        self._module.zero_grad()
        self._taken = 0

    def check(self, rows: int) -> None:
        """Refuse gradients that do not come from one backward of `rows` examples."""
        name = own_name(next(iter(self._parameters)))
        self._module.check(rows, f"per-sample gradients of {name}")

    def take(self, rows: int) -> None:
        """Add the clipped gradients of one backward of `rows` examples to the sum."""
        if not rows:
            self._module.discard()  # a forward without backward
        self._module.norms(rows)
        self._module.add(self._rule)
        self._taken += rows

    def noised_mean(
        self, rows: int, noise: torch.Tensor, t: int, by: float
    ) -> tuple[torch.Tensor, int]:
        """Return the batch's clipped sum plus noise, over `by`, flat, and the number of bad rows.

        Includes what `take` has added. Sums of whole units are exact, so no rank's rounding depends
        on the other ranks' examples, even with the noise added. On a process alone the mean takes
        the memory of the noise: fresh memory takes as long to touch as three passes over other.
        """
        self.take(rows)
        rows, self._taken = self._taken, 0
        if self.ranks.size == 1:
            parts, bad = self._module.finish_in_parts(PART.get(noise.device.type, PART["cuda"]))
            mean = noise if noise.dtype == self._dtype else noise.to(self._dtype)
            self._clip.mean_(mean, parts, noise, by)
        else:
            units, bad = self._module.finish()
            units.round_()
            self._clip.add_noise_(units[slice(*self._span)], noise)
            self.ranks.add_(units)
            mean = torch.empty_like(units, dtype=self._dtype)
            self._clip.mean_(mean, units, None, by)
            self._module.reuse(units)
        if bad:
            warn_non_finite(bad, rows, t)
        return mean, bad

    def write(self, mean: torch.Tensor) -> None:
        """Make `mean` the gradient of the parameters, in its memory where that can be."""
        parts = torch.split(mean, self._sizes)
        for p, part in zip(self._parameters.values(), parts, strict=True):
            p.grad = part.view_as(p).to(p.device, p.dtype)

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


def widest(parameters: Iterable[torch.Tensor]) -> torch.dtype:
    """Return the type in which gradients of these parameters are made, float32 or float64.

    >>> widest([torch.zeros(1, dtype=torch.bfloat16)])
    torch.float32
    """
    double = any(p.dtype == torch.float64 for p in parameters)
    return torch.float64 if double else torch.float32
