"""How good a split is, beside the best possible, and as a file says it: no privacy number."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from rootnoise._check import RootnoiseError

# By so much the ascent behind a lower bound may end elsewhere on another machine.
REPEATS = 1e-3


@dataclass(frozen=True)
class Optimality:
    """How good a mechanism is; not a privacy number.

    Attributes:
        rmse: expected approximation error at noise multiplier 1 and clip norm 1.
        lower_bound: no factorization has a smaller rmse, by `Mechanism.certificate`.

    >>> Optimality(rmse=2.5, lower_bound=2.0).to_dict()
    {'rmse': 2.5, 'lower_bound': 2.0, 'gap': 0.25}
    """

    rmse: float
    lower_bound: float

    @property
    def gap(self) -> float:
        """Return rmse / lower_bound - 1: no factorization can be better by more than this."""
        return self.rmse / self.lower_bound - 1

    def to_dict(self) -> dict[str, float]:
        """Return what a file holds: both numbers, and the gap that follows from them."""
        return asdict(self) | {"gap": self.gap}

    @classmethod
    def from_dict(cls, fields: Any) -> Optimality:
        """Return what a file holds; that its gap follows from the rest is not looked at.

        Raises:
            RootnoiseError: no object, or numbers that are missing or not positive.
        """
        if not isinstance(fields, dict):
            raise RootnoiseError(f"optimality must be an object, got {fields!r:.80}")
        rmse, bound = fields.get("rmse"), fields.get("lower_bound")
        if not isinstance(rmse, float) or not isinstance(bound, float) or not min(rmse, bound) > 0:
            raise RootnoiseError(
                f"optimality must hold rmse and lower_bound > 0, got {rmse!r} and {bound!r}"
            )
        return cls(rmse, bound)

    def refuse_other(self, again: Optimality) -> None:
        """Refuse numbers other than those that were computed again.

        Raises:
            RootnoiseError: they differ by more than two machines do.
        """
        for name, tolerance in (("rmse", 1e-6), ("lower_bound", REPEATS)):
            expected, held = getattr(again, name), getattr(self, name)
            if not math.isclose(expected, held, rel_tol=tolerance):
                raise RootnoiseError(
                    f"optimality.{name} must match what its definition gives, "
                    f"{expected!r}, got {held!r}"
                )
