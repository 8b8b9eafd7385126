"""Which learning rate to start at: the one at which the noise moves the weights a fixed distance.

The more noise, the smaller the best rate: over 297 settings and methods of
`papers/kalinin-lampert-2024` the best rate times the planned error is the same within a factor of
two in 92 % (docs/planning.md). So the plan alone, which knows no data, foretells the rate, and the
advice costs no privacy.
"""

from __future__ import annotations

from rootnoise._check import integer, real
from rootnoise.factorization import Factorization
from rootnoise.mechanism import Mechanism
from rootnoise.planner.job import CONTRACTION

# How far the noise moves a weight at the best rate, in root mean square over steps:
# `benchmarks/rates.py` fits 0.018 to the paper's runs; that of other settings was higher.
MOVED = 0.02
# Times the clip norm: larger advice was hardly held against training.
LARGEST = 4.0


def learning_rate(error: float, clip_norm: float = 1.0) -> float:
    """Return the learning rate to start at, of SGD with or without momentum.

    It is 0.02 / (error * clip_norm): the noise then moves each weight by 0.02. It is at most
    4 / clip_norm: larger advice was hardly held against training. With a schedule it is the rate
    that the schedule's values are relative to, its peak.

    Args:
        error: a row's `rmse_per_example`, planned for all iterates and the default contraction.
        clip_norm: of the gradients.

    Raises:
        RootnoiseError: a value that is not above 0.

    >>> learning_rate(0.25)
    0.08
    >>> learning_rate(0.25, clip_norm=0.5)
    0.16
    """
    moved = MOVED / real("error", error, above=0)
    return min(moved, LARGEST) / real("clip_norm", clip_norm, above=0)


def contracted_error(mechanism: Mechanism, batch_size: int) -> float:
    """Return the planned error of a mechanism per unit of clip norm, a row's `rmse_per_example`.

    Args:
        mechanism: for iterates in units of the learning rate.
        batch_size: examples per step, expected ones under Poisson sampling.

    Raises:
        RootnoiseError: a batch size below 1.
    """
    integer("batch_size", batch_size, 1)
    workload = mechanism.workload.contracted(CONTRACTION)
    split = Factorization("", workload, mechanism.strategy)
    return mechanism.noise_multiplier * split.rmse(mechanism.participation) / batch_size


def advised_rate(mechanism: Mechanism, batch_size: int) -> float:
    """Return the learning rate to start at with a mechanism, to two digits.

    Args:
        mechanism: for iterates in units of the learning rate (with a schedule, of its peak).
        batch_size: examples per step, expected ones under Poisson sampling.

    Raises:
        RootnoiseError: a batch size below 1.

    >>> from rootnoise.factorization import factorize
    >>> from rootnoise.participation import FixedCycle
    >>> from rootnoise.workload import SGD
    >>> split, who = factorize(SGD(80, momentum=0.9), FixedCycle(8, 10)), FixedCycle(8, 10)
    >>> made = Mechanism.calibrate(split, who, epsilon=2, delta=1e-5)
    >>> advised_rate(made, batch_size=200)
    0.12
    """
    rate = learning_rate(contracted_error(mechanism, batch_size), mechanism.clip_norm)
    return float(f"{rate:.2g}")
