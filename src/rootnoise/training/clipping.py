"""Per-sample gradients, clipped and summed: one example contributes at most the clip norm.

Floating-point sums break that bound: how they round depends on every summand, and adding one record
to 65,536 others moved a float32 sum by 1.0037 clip norms. So every clipped coordinate is truncated
towards zero to a whole number of grid units. The unit is a power of two, coarse enough for every
partial sum in float64 to be exact (`Clip`). Then

    sum(D) - sum(D without i)  =  clipped(g_i)  exactly,  and  |clipped(g_i)| <= clip_norm,

for any order of summation, block size and number of ranks. Noise is rounded to the grid too:
round(sum + z) = sum + round(z), so a release is the exact sum plus noise, rounded afterwards.
Integer arithmetic is also how Mironov (2012) and Balcer & Vadhan (2018) make sums exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rootnoise._check import clip_range, warn

if TYPE_CHECKING:
    from rootnoise.mechanism import Mechanism

# A float32 sum over a long row is too inaccurate for clipping: torch.linalg.vector_norm of 1e7
# equal numbers is 0.8 % off. Over blocks of 256, added up in float64, a norm is off by less than
# (256 + 2) / 2 * 2**-24 = 7.7e-6 whatever the order of the sum. The factor and the product round
# once each, 2**-23 together, and truncation only shrinks: the slack covers the total.
BLOCK = 256
SLACK = 1e-5

# Clipped values processed at a time: as many as fit a CPU's cache, or keep a GPU busy.
ROWS, WIDTH = 64, {"cpu": 2**12, "gpu": 2**20}
PART = 2**16  # float64 numbers of a vector processed at a time, on the CPU

# How many standard deviations of noise the grid leaves room for.
ROOM = 2**8


class NonFiniteGradientWarning(RuntimeWarning):
    """Some per-sample gradients were NaN or infinite and count as zero."""


@dataclass(frozen=True)
class Clip:
    """The clip norm, and the grid unit: every clipped coordinate is a whole number of units.

    Partial sums of at most `n_examples` rows are at most n_examples * clip_norm < 2^52 units, and
    the noise has as much room again, so float64 holds all of them exactly. Truncation changes a
    value by less than one unit: 2^-32 to 2^-31 clip norms for a million examples.

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

    def noised(
        self, units: torch.Tensor, noise: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the sum in units plus the noise in whole units, float64; `out` may be `units`."""
        total = torch.empty_like(units) if out is None else out
        size = max(1, PART if units.device.type == "cpu" else len(units))
        space = units.new_empty(min(size, len(units)))
        for i in range(0, len(units), size):
            drawn = noise[i : i + size]
            part = divide_(space[: len(drawn)].copy_(drawn), self.grid).round_()
            torch.add(units[i : i + size], part, out=total[i : i + size])
        return total


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


def clip_scale(norms: torch.Tensor, clip: Clip, t: int) -> tuple[torch.Tensor, int]:
    """Return each example's factor from gradient to grid units, and how many are not finite.

    Examples that are not finite, or whose squares are not (beyond 1e19), have factor 0, and
    `scaled_sum` leaves them out.
    """
    finite = norms.isfinite()
    bad = len(norms) - int(finite.sum())
    if bad:
        warn_non_finite(bad, len(norms), t)
        norms = norms.masked_fill(~finite, torch.inf)
    factor = (clip.norm / (norms * (1 + SLACK))).clamp(max=1)
    return (factor / clip.grid).float(), bad


def scaled_sum(scale: torch.Tensor, gradients: torch.Tensor, bad: int) -> torch.Tensor:
    """Return the sum of the rows of a (batch, size) matrix, each scaled and truncated.

    `bad` rows are not finite; their factor is 0.
    """
    scale = scale.to(gradients.device)
    total = torch.zeros(gradients.shape[1], dtype=torch.float64, device=gradients.device)
    width = WIDTH["cpu" if gradients.device.type == "cpu" else "gpu"]
    for i in range(0, gradients.shape[1], width):
        for j in range(0, len(gradients), ROWS):
            part, factors = gradients[j : j + ROWS, i : i + width], scale[j : j + ROWS, None]
            if bad:  # 0 times infinity is NaN
                part = part.masked_fill(factors == 0, 0)
            cut = part * factors
            cut -= cut.frac()  # exact, and on the CPU twelve times as fast as trunc
            total[i : i + width] += cut.sum(0, dtype=torch.float64)
    return total


def row_norms(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Return the joint l2 norm of each row over all matrices, float64 on the first's device."""
    squares = []
    for g in gradients:
        n_blocks = g.shape[1] // BLOCK
        blocks = g[:, : n_blocks * BLOCK].reshape(len(g), n_blocks, BLOCK)
        rest = torch.linalg.vector_norm(g[:, n_blocks * BLOCK :], dim=1).double()
        norms = torch.linalg.vector_norm(blocks, dim=2).double()
        squares.append((norms.square().sum(1) + rest.square()).to(gradients[0].device))
    return torch.stack(squares).sum(0).sqrt()
