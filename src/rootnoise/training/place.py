"""What the optimizer asks of what holds the parameters: whole copies, or shards of FSDP2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from rootnoise.training.ranks import Ranks


def own_name(name: str) -> str:
    """Return the name by which users know a parameter: its wrapper's prefix is not theirs.

    >>> own_name("_module.0.weight")
    '0.weight'
    """
    return name.removeprefix("_module.")


class Place(Protocol):
    """The parameters of a run as this process holds them, with clipped sums made where they are.

    Attributes:
        whole: whether each process holds all of them; otherwise each pass needs all processes.
        ranks: the processes that hold them.
        spans: this process's part of the flattened noise, as (start, stop).
    """

    whole: bool
    ranks: Ranks
    spans: list[tuple[int, int]]

    @property
    def doing(self) -> int:
        """What the ranks do with the sum of a micro-batch: `ranks.SENT` or `KEPT`."""

    def begin(self) -> None:
        """Take over the weights of rank 0, where each process has its own."""

    def clear(self) -> None:
        """Drop gradients, but not what a forward has left for a backward to come."""

    def check(self, rows: int) -> None:
        """Refuse what one backward of `rows` examples would not have left."""

    def take(self, rows: int) -> None:
        """Add what one backward of `rows` examples has left, clipped, to the sum of the step."""

    def noised_mean(
        self, rows: int, noise: torch.Tensor, t: int, by: float
    ) -> tuple[torch.Tensor, int]:
        """Return (clipped sum plus noise of step t) / by, flattened, and the number of bad rows.

        It may lie in the memory of the noise, which is overwritten then.
        """

    def write(self, mean: torch.Tensor) -> None:
        """Make `mean` the gradient of the parameters."""

    def save(self, rows: torch.Tensor, most: int) -> Any:
        """Return noise rows in a form that any number of processes can load."""

    def load(self, name: str, saved: Any, n_rows: int) -> torch.Tensor:
        """Return this process's columns of saved rows, or refuse another layout."""

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the state of the inner optimizer."""

    def load_optimizer_state(
        self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
    ) -> None:
        """Restore the state of the inner optimizer."""
