"""One client's whole update: checked, clipped in float64, and truncated to an integer grid.

Sums of integers are exact in any order, so a round does not depend on who replied first. Truncation
towards zero never increases a norm: a client's contribution to the sum has l2 norm at most
`clip_norm`, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from rootnoise._check import RootnoiseError

# Grid points in one clip norm, and the clients of one round: their product fits an int64.
POINTS, MOST_CLIENTS = 2**40, 2**22
# A float64 norm of d numbers is off by less than d 2**-53: this is enough for d = 9e8.
SLACK = 1e-7


class Malformed(Exception):  # noqa: N818
    """An update that is not one float tensor of the right shape for each weight."""


class Layout:
    """The position of each weight in the flat vector, which leaves out integer and boolean buffers.

    Args:
        weights: a state_dict; floating-point weights must be float32 or float64.

    Raises:
        RootnoiseError: no floating-point weights, or half-precision or complex ones.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.shapes: dict[str, torch.Size] = {}
        self.left_alone: list[str] = []
        for name, weight in weights.items():
            if not isinstance(weight, torch.Tensor):
                kind = type(weight).__name__
                raise RootnoiseError(f"weight {name} must be a tensor, got {kind}")
            if weight.dtype in (torch.float32, torch.float64):
                self.shapes[name] = weight.shape
            elif weight.is_floating_point() or weight.is_complex():
                raise RootnoiseError(
                    f"weight {name} must be float32 or float64 on the server (clients may send "
                    f"any float), got {weight.dtype}"
                )
            else:
                self.left_alone.append(name)
        places = [weights[name].untyped_storage().data_ptr() for name in self.shapes]
        shared = [n for n, p in zip(self.shapes, places, strict=True) if p and places.count(p) > 1]
        if shared:
            rule = "weights must not share memory (leave out all but one of tied ones)"
            raise RootnoiseError(f"{rule}, got {shared}")
        self.size = sum(shape.numel() for shape in self.shapes.values())
        if not self.size:
            raise RootnoiseError(f"weights must hold floating ones, got {list(weights)[:5]}")

    def flat(self, update: Any) -> torch.Tensor:
        """Return an update as one float64 vector, shape (size,).

        Raises:
            Malformed: names, types or shapes differ from the weights', or reading it raises.
        """
        try:
            parts = self._parts(update)
        except Exception:  # noqa: BLE001 - an update is untrusted and may raise anything
            raise Malformed from None
        return torch.cat(parts)

    def _parts(self, update: Any) -> list[torch.Tensor]:
        if not isinstance(update, Mapping) or not self.shapes.keys() <= update.keys():
            raise Malformed
        if update.keys() - self.shapes.keys() - set(self.left_alone):
            raise Malformed
        return [_part(update[name], shape) for name, shape in self.shapes.items()]

    def split(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the parts of a flat vector, each in its weight's shape."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = zip(self.shapes.items(), torch.split(vector, sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}

    def describe(self) -> list[list[Any]]:
        """Return [name, shape] of each weight, for comparison."""
        return [[name, list(shape)] for name, shape in self.shapes.items()]


def _part(tensor: Any, shape: torch.Size) -> torch.Tensor:
    if isinstance(tensor, np.ndarray):
        tensor = torch.as_tensor(np.array(tensor))  # a copy: torch warns about read-only arrays
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise Malformed  # a subclass may report a false norm
    if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.shape != shape:
        raise Malformed
    part: torch.Tensor = tensor.detach().to("cpu", torch.float64).reshape(-1)
    return part


def on_grid(vector: torch.Tensor, clip_norm: float) -> torch.Tensor | None:
    """Return a float64 vector clipped to `clip_norm`, in int64 units of clip_norm / POINTS.

    Returns None if the vector is not finite.
    """
    largest = float(vector.abs().max())  # NaN if any entry is
    if not largest < float("inf"):
        return None
    if largest == 0:
        return torch.zeros_like(vector, dtype=torch.int64)
    # After division by the largest, no square overflows, and none that matters underflows.
    unit = vector / largest
    norm = float(torch.linalg.vector_norm(unit))
    scale = min(largest / clip_norm, 1 / (norm * (1 + SLACK)))
    return (unit * (scale * POINTS)).trunc().to(torch.int64)


def from_grid(total: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """Return a sum of grid vectors as float64, rounded once."""
    return total.double() * (clip_norm / POINTS)
