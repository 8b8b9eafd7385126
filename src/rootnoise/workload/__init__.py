"""WHAT is computed: the linear map from the gradients of all steps to what is released.

A workload is a frozen value that knows its matrix A and the square root of that matrix.
"""

from __future__ import annotations

from typing import Any

from rootnoise._check import RootnoiseError
from rootnoise.workload.base import Workload
from rootnoise.workload.matrix import MatrixWorkload
from rootnoise.workload.optimizer import from_optimizer
from rootnoise.workload.schedule import ScheduledSGD, learning_rates
from rootnoise.workload.toeplitz import SGD, ToeplitzWorkload, prefix_sum

__all__ = [
    "SGD",
    "MatrixWorkload",
    "ScheduledSGD",
    "ToeplitzWorkload",
    "Workload",
    "from_dict",
    "from_optimizer",
    "learning_rates",
    "prefix_sum",
]


def from_dict(fields: dict[str, Any]) -> Workload:
    """Rebuild a workload from `to_dict`.

    Raises:
        RootnoiseError: an unknown type, or fields that are missing or do not belong.
    """
    match fields:
        case {"type": "sgd", "n_steps": n, "momentum": beta, "decay": alpha, **rest} if not rest:
            return SGD(n, beta, alpha)
        case {"type": "toeplitz", "coefficients": list(a), **rest} if not rest:
            return ToeplitzWorkload(a)
        case {"type": "matrix", "entries": list(a), **rest} if not rest:
            return MatrixWorkload(a)
        case {"type": "scheduled-sgd", **settings} if settings.keys() == _SETTINGS:
            return ScheduledSGD(**settings)
    raise RootnoiseError(f"workload must be of a known type, got {fields!s:.60}")


_SETTINGS = ScheduledSGD.__dataclass_fields__.keys()
