"""WHAT is computed: the linear map from the gradients of all steps to what is released.

A workload is a frozen value that knows its matrix A and the square root of that matrix.
"""

from __future__ import annotations

from rootnoise.workload.base import WORKLOADS, Workload
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

from_dict = WORKLOADS.from_dict
