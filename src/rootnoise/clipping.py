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
    norms = row_norms(gradients)
    finite = norms.isfinite()
    bad = len(norms) - int(finite.sum())
    if bad:
        warnings.warn(
            f"{bad} of {len(norms)} per-sample gradients of step {t} are not finite and "
            "count as zero (the guarantee does not cover this number)",
            NonFiniteGradientWarning,
            stacklevel=3,
        )
        norms = norms.masked_fill(~finite, torch.inf)
        gradients = [g.masked_fill(~finite[:, None].to(g.device), 0) for g in gradients]
    scale = (clip_norm / (norms * (1 + SLACK))).clamp(max=1).float()
    return [scale.to(g.device) @ g for g in gradients], bad


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
