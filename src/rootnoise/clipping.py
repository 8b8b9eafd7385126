"""Per-sample gradients, clipped and summed: what one example can add is at most the clip norm."""

from __future__ import annotations

import warnings

import torch

# A float32 sum over a long row loses more than clipping can afford: torch.linalg.vector_norm of 1e7
# equal numbers is 0.8 % off. Over blocks of 256, added up in float64, a norm is off by less than
# (256 + 2) / 2 * 2**-24 = 7.7e-6 whatever the order of the sum; the slack exceeds that.
BLOCK = 256
SLACK = 1e-5


class NonFiniteGradientWarning(RuntimeWarning):
    """Some per-sample gradients were NaN or infinite and counted as zero."""


def clipped_sums(
    gradients: list[torch.Tensor], clip_norm: float, t: int
) -> tuple[list[torch.Tensor], int]:
    """Return the sum over the batch of each parameter's clipped gradients, flattened.

    Args:
        gradients: one float32 (batch, size) matrix a parameter.
        clip_norm: largest joint l2 norm of an example's rows that goes into the sums.
        t: the step, for the warning.

    Returns:
        The sums, and how many examples had a gradient that was not finite and counted as zero.
    """
    scale, bad = clip_scale(row_norms(gradients), clip_norm, t)
    return [scaled_sum(scale, g, bad) for g in gradients], bad


def clip_scale(norms: torch.Tensor, clip_norm: float, t: int) -> tuple[torch.Tensor, int]:
    """Return what each example's gradient is multiplied by, and how many are not finite.

    The factor of those is 0, and `scaled_sum` leaves them out.
    """
    finite = norms.isfinite()
    bad = len(norms) - int(finite.sum())
    if bad:
        warnings.warn(
            f"{bad} of {len(norms)} per-sample gradients of step {t} are not finite and "
            "count as zero (the guarantee does not cover this number)",
            NonFiniteGradientWarning,
            stacklevel=4,
        )
        norms = norms.masked_fill(~finite, torch.inf)
    return (clip_norm / (norms * (1 + SLACK))).clamp(max=1).float(), bad


def scaled_sum(scale: torch.Tensor, gradients: torch.Tensor, bad: int) -> torch.Tensor:
    """Return the sum over the rows of a (batch, size) matrix, each times its factor.

    `bad` of the rows may hold anything: their factor is 0.
    """
    scale = scale.to(gradients.device)
    if bad:  # 0 times infinity is no number
        gradients = gradients.masked_fill((scale == 0)[:, None], 0)
    return scale @ gradients


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
