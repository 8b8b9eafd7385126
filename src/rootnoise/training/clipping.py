"""The grid of clipped sums: partial sums and noise are whole numbers of its unit, added exactly.

Floating-point sums break the bound of one clip norm an example: how they round depends on every
summand. So each rank's sum is rounded to a whole number of grid units (`replicated.Copies`), and
noise is too. The unit is a power of two, coarse enough for every partial sum in float64 to be exact
(`Clip`): sums of ranks and micro-batches do not depend on their order, and since round(sum + z) =
sum + round(z), a release is the exact sum plus noise, rounded afterwards. Integer arithmetic is
also how Mironov (2012) and Balcer & Vadhan (2018) make sums exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rootnoise._check import RootnoiseError, clip_range, warn

if TYPE_CHECKING:
    from rootnoise.mechanism import Mechanism

# Numbers of a vector processed at a time: in the cache of a CPU, in little memory of a GPU.
PART = {"cpu": 2**16, "cuda": 2**24}

# How many standard deviations of noise the grid leaves room for.
ROOM = 2**8


class NonFiniteGradientWarning(RuntimeWarning):
    """Some per-sample gradients were NaN or infinite and count as zero."""


@dataclass(frozen=True)
class Clip:
    """The clip norm, and the grid unit, of which every coordinate of a sum is a whole number.

    Partial sums of at most `n_examples` rows are at most n_examples * clip_norm < 2^52 units, and
    the noise has as much room again, so float64 holds all of them exactly. Rounding changes a value
    by at most half a unit: a unit is 2^-32 to 2^-31 clip norms for a million examples.

    Attributes:
        norm: largest joint l2 norm of an example's clipped gradient.
        grid: the unit, a power of two.

    >>> Clip.fit(1.0, n_examples=2**20).grid == 2.0**-31
    True
    """

    norm: float
    grid: float

    @classmethod
    def fit(cls, norm: float, n_examples: int, noise_std: float = 0.0) -> Clip:
        """Return the finest grid on which sums of n_examples rows and their noise are exact."""
        largest = max(clip_range(norm) * n_examples, ROOM * noise_std)
        return cls(norm, math.ldexp(1.0, math.frexp(largest)[1] - 52))

    @classmethod
    def of(cls, mechanism: Mechanism, n_examples: int) -> Clip:
        """Return the clip of a mechanism for a data set of n_examples."""
        return cls.fit(mechanism.clip_norm, n_examples, mechanism.noise_std)

    def add_noise_(self, units: torch.Tensor, noise: torch.Tensor) -> None:
        """Add noise, in whole units, to whole units in place."""
        for part, drawn in zip(split(units), split(noise), strict=True):
            part.add_(self._whole(drawn, torch.empty_like(part)))

    def mean_(
        self,
        out: torch.Tensor,
        units: torch.Tensor | Iterable[torch.Tensor],
        noise: torch.Tensor | None,
        by: float,
    ) -> None:
        """Write (sum + noise) / by, the sum given in units and both rounded to whole ones.

        One pass over vectors that fit into no cache: of a million numbers each takes 0.5 ms out of
        memory, and 0.1 ms out of a cache.

        Args:
            out: float32 or float64; may be the noise itself, or the sum.
            units: float64, whole or in parts, which make up a vector as long as `out`.
            noise: None where it is in the sum.
            by: the divisor.

        Raises:
            RootnoiseError: parts that make up another length.
        """
        # Dividing by by / grid has the bits of multiplying by the grid, a power of two, before.
        count, start, space = by / self.grid, 0, out.new_empty(2, 0, dtype=torch.float64)
        for part in split(units) if isinstance(units, torch.Tensor) else units:
            stop = start + len(part)
            drawn, to = (out if noise is None else noise)[start:stop], out[start:stop]
            start = stop
            if space.shape[1] < len(part):
                space = part.new_empty(2, len(part))
            sums, draws = space[:, : len(part)]
            torch.round(part, out=sums)
            if noise is not None:
                sums.add_(self._whole(drawn, draws))
            to.copy_(divide_(sums, count))
        if start != len(out):
            raise RootnoiseError(f"parts of a sum must make up {len(out)} numbers, got {start}")

    def _whole(self, noise: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write the noise in whole units, float64."""
        return divide_(out.copy_(noise), self.grid).round_()


def split(vector: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return a vector's parts of `PART` numbers."""
    return torch.split(vector, PART.get(vector.device.type, PART["cuda"]))


def divide_(x: torch.Tensor, by: float) -> torch.Tensor:
    """Divide in place; by a power of two as a product, as exact and on a CPU four times as fast.

    >>> divide_(torch.tensor([3.0, 1.0]), 4), divide_(torch.tensor([3.0]), 3)
    (tensor([0.7500, 0.2500]), tensor([1.]))
    """
    exact = math.frexp(by)[0] == 0.5 and abs(math.frexp(by)[1]) < 1000  # else 1 / by may overflow
    return x.mul_(1 / by) if exact else x.div_(by)


def warn_non_finite(bad: int, rows: int, t: int) -> None:
    """Warn that `bad` of the examples of step t count as zero."""
    warn(
        f"{bad} of {rows} per-sample gradients of step {t} are not finite and "
        "count as zero (the guarantee does not cover this number)",
        NonFiniteGradientWarning,
    )
