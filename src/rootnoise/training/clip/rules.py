"""Clipping rules: from norms to factors, so that each example's contribution is bounded.

A rule gets the norm of each group of an example's gradient (a group is a layer) and returns a
factor for each group. `sensitivity` bounds the joint norm of the scaled gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rootnoise._check import real
from rootnoise.training.clip.bounds import SLACK


@dataclass(frozen=True)
class ClipRule:
    """Turns an example's group norms into factors; see the subclasses.

    Attributes:
        clip_norm: largest l2 norm C of one example's contribution, over all parameters.

    Raises:
        RootnoiseError: a clip norm that is not positive and finite.
    """

    clip_norm: float

    def __post_init__(self) -> None:
        real("clip_norm", self.clip_norm, above=0)

    @property
    def sensitivity(self) -> float:
        """Largest l2 norm of one example's contribution."""
        return self.clip_norm

    def factors(self, squares: torch.Tensor) -> torch.Tensor:
        """Return the factors (groups, examples) for squared group norms of that shape, float64."""
        raise NotImplementedError

    @property
    def _most(self) -> float:
        return self.clip_norm * (1 - SLACK)


class Flat(ClipRule):
    """min(1, C / norm): the joint norm over all groups becomes at most C (Abadi et al., 2016).

    >>> Flat(1.0).factors(torch.tensor([[9.0, 0.09], [16.0, 0.16]]))
    tensor([[0.2000, 1.0000],
            [0.2000, 1.0000]])
    """

    def factors(self, squares: torch.Tensor) -> torch.Tensor:
        """Return one factor per example, the same for all groups."""
        return (self._most / squares.sum(0).sqrt()).clamp(max=1).expand_as(squares)


class PerLayer(ClipRule):
    """min(1, C_g / norm_g) in each of G groups, with C_g = C / sqrt(G) (McMahan et al., 2018).

    The scaled groups have norms at most C_g, so the joint norm is at most sqrt(G C^2 / G) = C.

    >>> PerLayer(1.0).factors(torch.tensor([[9.0], [0.16]]))
    tensor([[0.2357],
            [1.0000]])
    """

    def factors(self, squares: torch.Tensor) -> torch.Tensor:
        """Return a factor for each group of each example."""
        return (self._most / math.sqrt(len(squares)) / squares.sqrt()).clamp(max=1)


@dataclass(frozen=True)
class Automatic(ClipRule):
    """C / (norm + gamma): every gradient is normalised (Bu et al., 2023, "Automatic clipping").

    The scaled norm is C norm / (norm + gamma) < C. Nothing adapts to the data: gamma is fixed.

    Attributes:
        gamma: keeps small gradients smaller than large ones; 0.01 in the paper.

    >>> Automatic(1.0, gamma=1.0).factors(torch.tensor([[9.0, 0.0]]))
    tensor([[0.2500, 1.0000]])
    """

    gamma: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        real("gamma", self.gamma, above=0)

    def factors(self, squares: torch.Tensor) -> torch.Tensor:
        """Return one factor per example, the same for all groups."""
        return (self._most / (squares.sum(0).sqrt() + self.gamma)).expand_as(squares)
